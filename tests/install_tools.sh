#!/bin/sh
# What tests use besides Python, where it can be had: a browser for the pages. Quick if it is there; never fails: a test that lacks
# its tool skips itself and says so.
for browser in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$browser" >/dev/null 2>&1 && exit 0
done
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0
echo "tests: installing chromium"
export DEBIAN_FRONTEND=noninteractive
timeout 300 sh -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium' >/dev/null 2>&1 ||
    echo "tests: chromium could not be installed; the tests of pages will be skipped"
exit 0
