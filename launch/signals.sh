# Sourced by the scripts that start a launcher: hands signals on to the ranks, where a launcher by itself would end without them.
#
#   stay COMMAND ...    runs it in the background as process $runner, to its end, and exits with its code
#   pass_on NAME        the script's own: sends the signal to the ranks
#
# USR1, and TERM as USR1, save and end; they are passed on again every 5 s, since a rank that has only begun does not hear yet. USR2 asks
# the ranks what they are doing.
# shellcheck shell=bash
command -v "${PYTHON:-.venv/bin/python}" > /dev/null ||
    { echo "error: PYTHON=${PYTHON:-.venv/bin/python} does not run here: set it to the interpreter that has megatronish, or run \`make setup\`" >&2; exit 2; }
runner='' told=no
# shellcheck disable=SC2317 # called by trap
end_soon() {
    told=yes
    [ -n "$runner" ] || exit 143
    pass_on USR1
    (trap - USR1 USR2 TERM; while sleep 5 && kill -0 "$runner" 2> /dev/null; do pass_on USR1; done) 2> /dev/null &
}
stay() {
    local code
    trap end_soon USR1 TERM
    trap 'told=yes; [ -z "$runner" ] || pass_on USR2' USR2
    # Ranks that inherit this ignore USR1 until Python has come so far as to hold it back.
    (trap '' USR1; exec "$@") &
    runner=$!
    while :; do
        told=no
        wait "$runner" && code=0 || code=$?
        [ "$told" = yes ] || exit "$code"
    done
}
