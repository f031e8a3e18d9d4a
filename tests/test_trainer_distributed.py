"""Two ranks (gloo, on the CPU) do what one process does: gradients, multipliers, evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_ranks import KINDS, SHARDED, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *(str(Path(__file__).with_name("trainer_ranks.py")), str(folder)),
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            _, errors = child.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            child.terminate()  # not kill: on SIGTERM the launcher ends its ranks
            raise
    assert child.returncode == 0, errors[-4000:]
    names = [*KINDS, *(f"shards-{kind}" for kind in SHARDED)]
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return {kind: run(kind, tmp_path_factory.mktemp(kind), 1) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_weights_equal_those_of_one_process(kind, two_ranks, one_process):
    expected, found = one_process[kind], two_ranks[kind]
    assert len(expected["gradients"]) == len(found["gradients"]) == 4
    for first, second in zip(expected["gradients"], found["gradients"], strict=True):
        assert first.keys() == second.keys()
        largest = max(float(value.abs().max()) for value in first.values())
        assert largest > 0
        for name, value in first.items():
            assert float((second[name] - value).abs().max()) <= 1e-6 * largest, name
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_thresholds_and_logs_equal_those_of_one_process(kind, two_ranks, one_process):
    expected, found = one_process[kind], two_ranks[kind]
    for field in ("multiplier", "threshold", "average"):
        assert found["dual"][field] == pytest.approx(expected["dual"][field], rel=1e-6), field
    assert found["dual"]["steps"] == 4
    assert expected["dual"]["multiplier"]["brief"] > 0
    for first, second in zip(expected["log"], found["log"], strict=True):
        for key in ("loss", "margin", "kl", "kl_first", "effective_sample_size", "satisfaction/helpful", "slack/brief"):
            assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_every_held_out_prompt_once(kind, two_ranks, one_process):
    """5 prompts, 2 a batch, 2 ranks: three places of the last round are filled with repeats."""
    for key, value in one_process[kind]["eval"].items():
        if not any(word in key for word in ("runtime", "per_second", "preparation")):
            assert two_ranks[kind]["eval"][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_ranks_share_the_reference_pass(two_ranks, one_process):
    for first, second in zip(one_process["full"]["ref_logprob"], two_ranks["full"]["ref_logprob"], strict=True):
        assert second == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_parameters_get_the_gradients_of_the_whole_batch(kind, two_ranks):
    """FSDP2 gathers weights and reduces gradients around the forward that holds the loss; LoRA on the head included."""
    errors = two_ranks[f"shards-{kind}"]
    assert len(errors) == (6 if kind == "lora" else 21)
    assert max(errors.values()) < 1e-12
