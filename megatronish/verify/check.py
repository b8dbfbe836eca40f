"""`megatronish verify`: is this config's layout the same mathematics as one process? On local processes, in seconds.

Three passes over the folded config (see `fold.py`), each a few steps on random tokens with uneven masks:

- **exact**: float64, against the plain model and torch.optim.AdamW in one process; saved and loaded between the steps.
- **reloaded**: what the layout saved, loaded by one process.
- **own precision**: the config's dtype, against the same trainer in one process; the yardstick is how far that is from float64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatronish.comm.local_ranks import RankError, RankPool
from megatronish.config import Config
from megatronish.verify.compare import Difference, differences, gradient_differences, join, weight_differences
from megatronish.verify.layout_run import RankResult, loaded_weights, run_layout, world_size_of
from megatronish.verify.narrow import narrow, what_is_left
from megatronish.verify.reference import Reference, train_reference

EXACT = 1e-10
"""float64 has an epsilon of 2e-16; sums of thousands of terms in another order, through a few layers and two steps of AdamW, are
seen to differ by at most 2e-12. A wrong or missing term shows at 1e-4 or more."""
YARDSTICK = 4.0
"""In low precision a layout may be this many times as far from one process as that is from float64: both round alike, in other
places, so twice is expected; the largest error of all tensors is the measure, so that one lucky tensor does not decide."""
OFFSET = 1e-6
"""Added to the yardstick: two sums of float32 in another order."""
LOOSEST = 0.5
"""No tolerance is above this: half of a tensor's largest element proves nothing."""
ROUNDING = {None: 0.0, "float32": 2.0**-22, "bfloat16": 2.0**-8}
"""By optim.grad_reduce_dtype, for each replica: what gradients lose on their way, which one process has none of. A unit in the last
place, twice where the sum is smaller than what it is made of."""

RunRank = Callable[..., RankResult]


@dataclass
class Check:
    """One row of the table: things of one kind, compared in one pass."""

    name: str
    compared: int = 0
    worst: Difference | None = None
    tolerance: float = EXACT
    first_wrong: Difference | None = None
    first_wrong_at: int = 0
    """Its place among all comparisons of the pass."""
    made_by: Callable[..., list[Check]] | None = field(default=None, repr=False)
    """The pass."""

    def add(self, difference: Difference, *, place: int = 0) -> None:
        """Count one comparison."""
        self.compared += 1
        if self.worst is None or difference.error > self.worst.error:
            self.worst = difference
        if self.first_wrong is None and not difference.error <= self.tolerance:
            self.first_wrong, self.first_wrong_at = difference, place


@dataclass
class Verdict:
    """What was found for one config."""

    folded: Config
    checks: list[Check] = field(default_factory=list)
    crash: str | None = None
    """The traceback of a rank that failed."""
    left: list[tuple[str, object]] = field(default_factory=list)
    """After a failure: what the fault needs, see `narrow.py`."""

    @property
    def first_wrong(self) -> Difference | None:
        """The first thing that differs, in the order in which a fault spreads."""
        wrong = [check for check in self.checks if check.first_wrong is not None]
        return min(wrong, key=lambda check: check.first_wrong_at).first_wrong if wrong else None

    @property
    def wrong_pass(self) -> Callable[..., list[Check]]:
        """The pass in which something is wrong."""
        return next(check.made_by for check in self.checks if check.first_wrong is not None and check.made_by is not None)

    @property
    def ok(self) -> bool:
        return self.crash is None and self.first_wrong is None


def verify(
    folded: Config, pool: RankPool, *, run: RunRank = run_layout, tell: Callable[[str], None] = lambda text: None
) -> Verdict:
    """Check a folded config and, if it fails, find out what the fault needs. `run` is what each rank runs; `tell` gets progress."""
    verdict = Verdict(folded)
    try:
        tell("float64 against one process of plain PyTorch")
        verdict.checks += exact_checks(folded, pool, run=run)
        if verdict.ok and folded.optim.grad_reduce_dtype is not None:
            tell("gradients rounded on their way")
            verdict.checks += rounded_checks(folded, pool, run=run)
        if verdict.ok and folded.train.dtype != "float64":
            tell(f"{folded.train.dtype} against one process")
            verdict.checks += own_precision_checks(folded, pool, run=run)
    except RankError as error:
        verdict.crash = str(error)
    if not verdict.ok:
        tell("looking for what the fault needs")
        passes = exact_checks if verdict.crash is not None else verdict.wrong_pass
        verdict.left = list(what_is_left(narrow(folded, lambda config: _fails(config, pool, run, passes))))
    return verdict


def _fails(config: Config, pool: RankPool, run: RunRank, passes: Callable[..., list[Check]]) -> bool:
    try:
        return any(check.first_wrong is not None for check in passes(config, pool, run=run))
    except RankError:
        return True


def in_dtype(config: Config, dtype: str) -> Config:
    """The same run in another precision."""
    update: dict[str, object] = {"dtype": dtype}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def with_reduce_dtype(config: Config, dtype: str | None) -> Config:
    """The same run with gradients in another precision on their way."""
    return config.model_copy(update={"optim": config.optim.model_copy(update={"grad_reduce_dtype": dtype})})


def one_process(config: Config) -> Config:
    """The same run, global batch included, without any layout."""
    plain = type(config.parallel)(data=1)
    return config.model_copy(update={"parallel": plain})


def exact_checks(config: Config, pool: RankPool, *, run: RunRank) -> list[Check]:
    """The float64 pass, and the reloading by one process."""
    config = with_reduce_dtype(in_dtype(config, "float64"), None)
    expected = train_reference(config)
    with tempfile.TemporaryDirectory() as folder:
        results = pool.run(world_size_of(config), run, config, Path(folder))
        reloaded = pool.run(1, loaded_weights, one_process(config), Path(folder))
    rows = {kind: Check(name, made_by=exact_checks) for kind, name in _EXACT_ROWS.items()}
    place = 0
    for place, difference in enumerate(differences(results, expected)):
        rows[difference.kind].add(difference, place=place)
    last = Check("weights saved by the layout, loaded by one process", made_by=exact_checks)
    for difference in weight_differences(reloaded, expected.weights[-1], after="reloading"):
        last.add(difference, place=place + 1)
    return [*rows.values(), last]


_EXACT_ROWS = {
    "gradient": "gradients, every parameter and step",
    "norm": "gradient norm, every rank and step",
    "loss": "loss, every rank and step",
    "weight": "updated weights, saved and loaded between the steps",
}


def rounded_checks(config: Config, pool: RankPool, *, run: RunRank) -> list[Check]:
    """float64 with gradients in float32 on their way: that they are rounded there, and nowhere else."""
    config = with_reduce_dtype(in_dtype(config, "float64"), "float32")
    tolerance = ROUNDING["float32"] * (config.parallel.data or 1)
    rows = [Check(f"first {what} in float64, float32 on the way", tolerance=tolerance, made_by=rounded_checks) for what in _SCALARS]
    _compare(rows, pool.run(world_size_of(config), run, config), train_reference(config), num_steps=1)
    return rows


_SCALARS = ("gradients", "norm, losses")


def own_precision_checks(config: Config, pool: RankPool, *, run: RunRank) -> list[Check]:
    """The config's own dtype: first gradients, norm and losses against the same trainer in one process."""
    truth = train_reference(with_reduce_dtype(in_dtype(config, "float64"), None))
    (single,) = pool.run(1, run, one_process(config))
    plain = _as_reference(single, truth)
    yardstick = [Check("gradients"), Check("norm and losses")]
    _compare(yardstick, [single], truth)
    results = pool.run(world_size_of(config), run, config)
    rows = []
    rounding = ROUNDING[config.optim.grad_reduce_dtype] * (config.parallel.data or 1)
    for what, measure in zip(_SCALARS, yardstick, strict=True):
        assert measure.worst is not None
        tolerance = min(YARDSTICK * measure.worst.error + OFFSET + rounding, LOOSEST)
        name = f"first {what} in {config.train.dtype}, against one process"
        rows.append(Check(name, tolerance=tolerance, made_by=own_precision_checks))
    _compare(rows, results, plain)
    return rows


def _as_reference(result: RankResult, like: Reference) -> Reference:
    """What one process saw, as a truth to compare with."""
    first = join([result.gradients[0]], "gradient", like.gradients[0])
    return Reference(result.losses, result.norms, [first])


def _compare(rows: list[Check], results: list[RankResult], expected: Reference, *, num_steps: int | None = None) -> None:
    gradients, scalars = rows
    for difference in gradient_differences([r.gradients[0] for r in results], expected.gradients[0], step=1):
        gradients.add(difference)
    for difference in _scalar_differences(results, expected, num_steps=num_steps):
        scalars.add(difference)


def _scalar_differences(results: list[RankResult], expected: Reference, *, num_steps: int | None) -> Iterator[Difference]:
    for rank, result in enumerate(results):
        yield Difference("norm", f"norm of step 1 on rank {rank}", abs(result.norms[0] / expected.norms[0] - 1))
        pairs = list(zip(result.losses, expected.losses, strict=True))[:num_steps]
        for step, (got, truth) in enumerate(pairs, start=1):
            yield Difference("loss", f"loss of step {step} on rank {rank}", abs(got / truth - 1))
