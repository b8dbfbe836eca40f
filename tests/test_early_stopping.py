"""Patience: counted over evaluations, kept over a save."""

from __future__ import annotations

import json
import math

from megatronish.early_stopping import EarlyStopping


def test_it_is_exhausted_after_patience_evaluations_without_a_new_lowest() -> None:
    stopping = EarlyStopping(2)
    verdicts = []
    for loss in (3.0, 2.0, 2.0, 1.5, 1.6, math.nan):
        stopping.update(loss)
        verdicts.append(stopping.is_exhausted)
    assert verdicts == [False, False, False, False, False, True]
    assert stopping.lowest == 1.5 and "1.5" in stopping.describe()


def test_without_patience_it_never_is() -> None:
    stopping = EarlyStopping(None)
    for _ in range(100):
        stopping.update(1.0)
    assert not stopping.is_exhausted


def test_a_restored_one_goes_on_where_the_saved_one_was() -> None:
    for losses in ([], [2.0], [2.0, 3.0, 2.5]):
        saved, restored = EarlyStopping(3), EarlyStopping(3)
        for loss in losses:
            saved.update(loss)
        restored.restore(json.loads(json.dumps(saved.state())))
        assert restored == saved
    restored.restore({})
    assert restored == EarlyStopping(3)
