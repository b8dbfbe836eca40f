from __future__ import annotations

import pytest
from torch import Tensor

from megatronish.checkpoint import exchange
from megatronish.comm import Group, all_gather
from tests.checkpoint.support import ThreadGroup, gather_among_threads


@pytest.fixture(autouse=True)
def ranks_may_be_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(x: Tensor, group: Group, *, what: str) -> Tensor:
        return gather_among_threads(x, group) if isinstance(group, ThreadGroup) else all_gather(x, group, what=what)

    monkeypatch.setattr(exchange, "all_gather", gather)
