"""The demo's verdict: it must fail when a claim does not hold. (`make demo` runs the rest.)"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mopo_kernels.evaluation import WinRate

DEMO = Path(__file__).parent.parent / "examples" / "demo"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    import run as module

    return module


def comparisons(**changes: tuple[float, float]) -> Any:
    """Win rates under which every claim holds, but for the changes: policy_objective=(mean, low)."""
    rates = {
        "constrained": {"detail": (0.58, 0.54), "plain": (0.47, 0.43), "brevity": (0.44, 0.40)},
        "unconstrained": {"detail": (0.65, 0.61), "plain": (0.43, 0.40), "brevity": (0.36, 0.32)},
    }
    for key, value in changes.items():
        policy, objective = key.split("_")
        rates[policy][objective] = value
    return {
        policy: SimpleNamespace(
            win_rates={name: WinRate(name, mean, low, mean + 0.04, 60, 360) for name, (mean, low) in values.items()}
        )
        for policy, values in rates.items()
    }


def test_every_claim_holds_where_it_does(run: ModuleType) -> None:
    assert all(run.verify(run.Settings(), comparisons()).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"constrained_detail": (0.55, 0.499)},
        {"constrained_plain": (0.43, 0.40)},
        {"constrained_brevity": (0.38, 0.35)},
        {"unconstrained_plain": (0.46, 0.42), "unconstrained_brevity": (0.41, 0.38)},
    ],
    ids=["primary not above parity", "plain missed", "brevity missed", "nothing falls when free"],
)
def test_a_claim_that_does_not_hold_fails(run: ModuleType, changes: dict[str, tuple[float, float]]) -> None:
    assert list(run.verify(run.Settings(), comparisons(**changes)).values()).count(False) == 1


def test_an_interruption_gives_one_command_to_go_on_with(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--resume", "--output", "my runs"])
    assert run.again(sys.argv[1:]) == f"{sys.executable} run.py --resume --output 'my runs'"
    source = Path(run.__file__).read_text()
    assert source.count("go on with") == 1
    assert "resume with" not in source


def test_a_log_file_shows_training_progress(run: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bar = run.Bar("constrained", lines_every=2)
    state = SimpleNamespace(max_steps=5, global_step=0)
    bar.on_train_begin(None, state, None)
    for state.global_step in range(1, 6):
        bar.on_log(None, state, None, logs={"in_sample/satisfaction/plain": 0.5, "multiplier/plain": 1.25})
        bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("constrained ")]
    assert [line for line in lines if "plain 0.50 (x1.25)" in line][:3] == [
        f"constrained {step}/5  plain 0.50 (x1.25)" for step in (2, 4, 5)
    ]


def test_thresholds_can_be_met_on_the_shipped_labels(run: ModuleType) -> None:
    from mopo_kernels import load_preferences
    from mopo_kernels.data.report import win_rates
    from mopo_kernels.dual import solve_labels

    settings, data = run.Settings(), load_preferences(run.DATA)
    rates = win_rates(data)
    bounds = {name: bound + settings.safety for name, bound in settings.thresholds.items()}
    solution = solve_labels(
        rates.win_rate, rates.reference, data.objectives, settings.primary, bounds, settings.tau, estimator="snis"
    )
    assert solution.feasible
    assert all(multiplier > 0.05 for multiplier in solution.multiplier.values())
