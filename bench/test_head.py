"""The implementations under pytest-benchmark: ``pytest bench`` (small; ``python -m bench.head`` for real shapes)."""

from __future__ import annotations

from typing import Any

import pytest

from bench.implementations import BARE, IMPLEMENTATIONS, Inputs, Workload

SMALL = Workload(hidden=256, vocabulary=8192, prompts=4, length=64)


@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_and_gradients(benchmark: Any, implementation: str, trained: bool) -> None:
    if (reason := IMPLEMENTATIONS[implementation].unavailable()) is not None:
        pytest.skip(reason)
    work = Workload(**{**SMALL.__dict__, "trained": trained})
    inputs = Inputs.make(work, 0)
    benchmark.group = "head trained" if trained else "head frozen"
    result = benchmark.pedantic(IMPLEMENTATIONS[implementation].run, args=(inputs,), rounds=5, warmup_rounds=1)
    assert len(result) == (2 if implementation == BARE else 3) - (not trained)
