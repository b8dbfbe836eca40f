"""A window of steps under torch's profiler, as a Chrome trace a rank: open RUN/profile/*.json in https://ui.perfetto.dev."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"


class ProfileWindow:
    """Steps first .. last of a run. A life that begins inside the window profiles the rest of it."""

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        steps: tuple[int, int] | None,
        device_kind: str,
        wait: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """`wait` blocks until the device has done what it was given."""
        self.path = run_dir / FOLDER / f"rank-{rank:05d}.json"
        self._steps, self._device_kind, self._wait, self._log = steps, device_kind, wait, log
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """`step` is about to begin."""
        if self._steps is None or self._running is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device_kind == "cuda" else [])]
        self._running = profile(activities=activities, record_shapes=True)
        self._wait()
        self._running.start()

    def after(self, step: int) -> None:
        """`step` is done, and what follows it: the log, an evaluation, a save."""
        if self._running is not None and self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Stop and write what there is. Does nothing outside of the window."""
        if self._running is None:
            return
        running, self._running = self._running, None
        self._wait()
        running.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.stem}.tmp-{os.getpid()}.json")
        running.export_chrome_trace(str(temporary))
        temporary.replace(self.path)
        self._log(f"wrote {self.path} ({self.path.stat().st_size / 1e6:.1f} MB); open it in https://ui.perfetto.dev")
