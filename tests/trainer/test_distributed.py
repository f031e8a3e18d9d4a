"""2 and 3 ranks (gloo, on the CPU) do what one process does: gradients, multipliers, evaluation; DDP and FSDP2.

A launch does all kinds of runs: starting processes takes longer than they do.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trainer_ranks import KINDS, SHARDED, STEPS, build, launch, run
from trainer_samples import make_trainer

from mopo_kernels.trainer import last_complete_checkpoint
from mopo_kernels.trainer.distributed import resolve_fsdp

RANKS = (2, 3)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """By number of ranks, then by kind: what rank 0 ended with."""
    results = {}
    for ranks in RANKS:
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        child = launch(ranks, folder)
        assert child.returncode == 0, child.stdout[-4000:]
        names = [*KINDS, *(f"sharded-{kind}" for kind in SHARDED)]
        results[ranks] = {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in names}
    return results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """By number of ranks that it stands in for: they see the same prompts, but with fewer prompts than ranks."""
    both = {kind: run(kind, tmp_path_factory.mktemp(kind), 1) for kind in KINDS}
    other = {"scarce": run("scarce", tmp_path_factory.mktemp("scarce"), 1, stand_in=3)}
    return {2: both, 3: both | other}


CASES = [
    pytest.param(ranks, name, kind, id=f"{name}-{ranks}")
    for ranks in RANKS
    for kind in KINDS
    for name in (kind, *([f"sharded-{kind}"] if kind in SHARDED else []))
]


@pytest.mark.parametrize(("ranks", "name", "kind"), CASES)
def test_gradients_and_weights_equal_those_of_one_process(ranks, name, kind, ranked, one_process):
    """Ranks with unequal tokens and pairs, with no label ("hollow", first step), with no token (second step).

    The models are fp64, labels and reference log-probabilities fp32: equal to the latter's rounding.
    """
    expected, found = one_process[ranks][kind], ranked[ranks][name]
    assert len(expected["gradients"]) == len(found["gradients"]) == STEPS
    for first, second in zip(expected["gradients"], found["gradients"], strict=True):
        assert first.keys() == second.keys()
        largest = max(float(value.abs().max()) for value in first.values())
        assert largest > 0
        for parameter, value in first.items():
            assert float((second[parameter] - value).abs().max()) <= 1e-6 * largest, parameter
    for parameter, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][parameter], value, rtol=1e-6, atol=1e-6, msg=parameter)


@pytest.mark.parametrize(("ranks", "name", "kind"), CASES)
def test_multipliers_thresholds_and_logs_equal_those_of_one_process(ranks, name, kind, ranked, one_process):
    expected, found = one_process[ranks][kind], ranked[ranks][name]
    for field in ("multiplier", "threshold", "average"):
        assert found["dual"][field] == pytest.approx(expected["dual"][field], rel=1e-6), field
    assert found["dual"]["steps"] == STEPS
    assert expected["dual"]["multiplier"]["brief"] != 0.2
    for first, second in zip(expected["log"], found["log"], strict=True):
        for key in (
            *("loss", "aux_loss", "margin", "kl", "kl_first"),
            *("effective_sample_size", "in_sample/satisfaction/helpful"),
        ):
            assert (key in second) == (key in first), key
            if key in first:
                assert second[key] == pytest.approx(first[key], rel=1e-5, abs=1e-7), key
    assert len(expected["measured"]) == len(found["measured"]) == STEPS
    for first, second in zip(expected["measured"], found["measured"], strict=True):
        assert second == pytest.approx(first, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("ranks", "name", "kind"), CASES)
def test_evaluation_counts_every_held_out_prompt_once(ranks, name, kind, ranked, one_process):
    """5 prompts, 2 a batch: places of the last round are filled with repeats, 3 on 2 ranks, 1 on 3."""
    for key, value in one_process[ranks][kind]["eval"].items():
        if not any(word in key for word in ("runtime", "per_second", "preparation")):
            assert ranked[ranks][name]["eval"][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_share_the_reference_pass(ranks, ranked, one_process):
    expected = one_process[ranks]["full"]["ref_logprob"]
    for first, second in zip(expected, ranked[ranks]["full"]["ref_logprob"], strict=True):
        assert second == pytest.approx(first, rel=1e-9)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", SHARDED)
def test_parameters_are_sharded_layer_by_layer(ranks, kind, ranked):
    found = ranked[ranks][f"sharded-{kind}"]
    layers = [name for name in found["units"] if name.rpartition(".")[2] in ("0", "1")]
    assert len(layers) == 2
    assert found["whole"] == []


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", SHARDED)
def test_a_sharded_checkpoint_resumes_as_if_never_interrupted(ranks, kind, ranked):
    found = ranked[ranks][f"sharded-{kind}"]
    for parameter, value in found["weights"].items():
        assert torch.equal(found["resumed"][parameter], value), parameter
    assert found["resumed dual"] == found["dual"]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", SHARDED)
def test_the_saved_model_is_whole(ranks, kind, ranked):
    """Gathered from all ranks with FULL_STATE_DICT: every weight, or every adapter's."""
    found = ranked[ranks][f"sharded-{kind}"]
    trained = {name: value for name, value in found["weights"].items() if kind != "lora" or ".lora_" in name}
    assert found["saved"].keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(found["saved"][name], value), name


def test_a_killed_rank_ends_the_run_with_an_error_and_a_usable_checkpoint(tmp_path, one_process):
    """SIGKILL on one rank after the second step: the other must not wait for it for ever. One process resumes."""
    child = launch(2, tmp_path, "--kill")
    assert child.returncode != 0
    assert "SIGKILL" in child.stdout
    checkpoint = last_complete_checkpoint(tmp_path)
    assert checkpoint is not None
    assert int(checkpoint.rpartition("-")[2]) in (1, 2)
    trainer = build("full", tmp_path, 1, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    for name, parameter in trainer.model.named_parameters():
        expected = one_process[2]["full"]["weights"][name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_fsdp_is_refused_where_it_cannot_shard(tmp_path):
    """One process has nobody to shard with, and FSDP1 is another engine."""
    with pytest.raises(ValueError, match="fsdp: expected several processes with it; got NO"):
        make_trainer(tmp_path, fsdp=True)
    make_trainer(tmp_path)  # what accelerate leaves in the environment does not outlive the refusal
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    with pytest.raises(ValueError, match="fsdp_config: expected version 2; got 1"):
        resolve_fsdp(SimpleNamespace(state=state), None)
