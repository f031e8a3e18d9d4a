"""DeepSpeed ZeRO-3 on 2 ranks (gloo, on the CPU) does what one process does; skipped without deepspeed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from trainer_ranks import SHARDED, STEPS, ZERO_LEARNING_RATE, build, launch, make_policy
from trainer_samples import make_config

HAS_DEEPSPEED = find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    child = launch(2, folder, "--deepspeed")
    assert child.returncode == 0, child.stdout[-4000:]
    return {kind: torch.load(folder / f"{kind}.pt", weights_only=False) for kind in SHARDED}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    results = {}
    for kind in SHARDED:
        model = make_policy(kind, torch.float32)
        trainer = build(kind, tmp_path_factory.mktemp(kind), 1, model=model, learning_rate=ZERO_LEARNING_RATE)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        results[kind] = {
            "start": start,
            "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
            "dual": trainer.dual.state_dict(),
            "log": [line for line in trainer.state.log_history if "loss" in line],
            "eval": trainer.evaluate(),
        }
    return results


@needs_deepspeed
@pytest.mark.parametrize("kind", SHARDED)
def test_updates_equal_those_of_one_process(kind, ranked, one_process):
    """To fp32 rounding, of each parameter's largest update: its gradient is not to be had after the step."""
    expected, found = one_process[kind], ranked[kind]
    moved = {name: value - expected["start"][name] for name, value in expected["weights"].items()}
    largest = max(float(value.abs().max()) for value in moved.values())
    assert largest > 1e-4
    for name, value in expected["weights"].items():
        assert float((found["weights"][name] - value).abs().max()) <= 1e-4 * largest, name
    assert found["whole"] == []


@needs_deepspeed
@pytest.mark.parametrize("kind", SHARDED)
def test_multipliers_logs_and_evaluation_equal_those_of_one_process(kind, ranked, one_process):
    expected, found = one_process[kind], ranked[kind]
    assert found["dual"]["steps"] == STEPS
    assert found["dual"]["multiplier"] == pytest.approx(expected["dual"]["multiplier"], rel=1e-5)
    for first, second in zip(expected["log"], found["log"], strict=True):
        for key in ("loss", "margin", "kl", "effective_sample_size", "in_sample/satisfaction/helpful"):
            assert second.get(key) == pytest.approx(first.get(key), rel=1e-3, abs=1e-5), key
    for key in ("eval_loss", "eval_satisfaction/helpful", "eval_slack/brief"):
        assert found["eval"][key] == pytest.approx(expected["eval"][key], rel=1e-3), key


@needs_deepspeed
@pytest.mark.parametrize("kind", SHARDED)
def test_a_checkpoint_resumes_as_if_never_interrupted(kind, ranked):
    for name, value in ranked[kind]["weights"].items():
        assert torch.equal(ranked[kind]["resumed"][name], value), name
    assert ranked[kind]["resumed dual"] == ranked[kind]["dual"]


def test_deepspeed_is_refused_where_it_cannot_run(tmp_path):
    problem = "use_cpu False with it" if HAS_DEEPSPEED else "the package deepspeed to be installed"
    with pytest.raises(ValueError, match=f"deepspeed: expected {problem}"):
        make_config(tmp_path, deepspeed={"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"})
