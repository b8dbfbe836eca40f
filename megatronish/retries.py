"""A read that failed for a moment, as those of a network file system do, is tried again before it counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from megatronish.errors import may_pass

Result = TypeVar("Result")

RETRY_SECONDS = (0.2, 0.8, 2.0)
"""Between tries: together far less than a collective's time-out, since other ranks may wait."""
NUM_TRIES = len(RETRY_SECONDS) + 1


def retried(act: Callable[[], Result], *, passing: Callable[[OSError], bool] = may_pass) -> Result:
    """What `act` gives. While it raises an OSError that is `passing`, it is tried again, NUM_TRIES times in all; then that error is
    raised."""
    for seconds in RETRY_SECONDS:
        try:
            return act()
        except OSError as error:
            if not passing(error):
                raise
        time.sleep(seconds)
    return act()
