"""Parts of a suite that do what a test needs, without torch, which takes seconds to load."""

from __future__ import annotations

import os
import time

from megatronish.bench.suite_part import Request


def describe(request: Request) -> None:
    request.save({"device": "2 Cores of X", "device_kind": "cpu", "versions": {"torch": "2"}})


def works(request: Request) -> None:
    request.tell("half way")
    request.save({"bench": "limits", "matrix_tflops": {}, "published_tflops": {}})


def fails(request: Request) -> None:
    request.save({"half": 1})
    raise RuntimeError("the card fell out")


def hangs(request: Request) -> None:
    """With a process of its own, which must not be left behind."""
    child = os.fork()
    request.save({"child": child or os.getpid()})
    time.sleep(600)
