"""Which checkpoint is the best under thresholds, when training stops early, and what reaches TensorBoard."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from trainer_samples import lora, make_config, make_data, make_dual_data, make_model, make_trainer

from mopo_kernels.data import DataError, PreferenceData, PreferenceExample, PreferencePair


def drifting(folder, **changes):
    """Evaluates and saves after each of 8 steps in which nothing holds ``brief`` up, on the data it is trained on."""
    settings = {
        "eval_dataset": make_data(),
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "thresholds": {"brief": 0.445},
        "initial_multiplier": "zero",
        "learning_rate": 3e-3,
        "load_best_model_at_end": True,
        "on_infeasible": "warn",
    }
    return make_trainer(folder, lora(make_model()), **{**settings, **changes})


def evaluations(trainer):
    return {line["step"]: line for line in trainer.state.log_history if "eval_feasible_primary" in line}


def test_the_best_checkpoint_is_the_best_of_those_that_keep_the_thresholds(tmp_path):
    trainer = drifting(tmp_path)
    trainer.train()
    found = evaluations(trainer)
    kept = {step: line["eval_satisfaction/helpful"] for step, line in found.items() if line["eval_slack/brief"] >= 0}
    best = trainer.state.best_global_step
    assert 0 < len(kept) < len(found), "the run must cross the threshold"
    assert best == max(kept, key=kept.get)
    assert max(line["eval_satisfaction/helpful"] for line in found.values()) > kept[best], (
        "or the primary objective alone would have chosen the same"
    )
    for line in found.values():
        slack, primary = line["eval_slack/brief"], line["eval_satisfaction/helpful"]
        assert line["eval_feasible_primary"] == (primary if slack >= 0 else slack)
    stored = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    live = {name.replace(".default", ""): value for name, value in trainer.model.named_parameters()}
    assert all(torch.equal(live[name], value) for name, value in stored.items())


def test_where_no_checkpoint_keeps_the_thresholds_the_nearest_is_the_best(tmp_path):
    trainer = drifting(tmp_path, thresholds={"brief": 0.9})
    trainer.train()
    slacks = {step: line["eval_slack/brief"] for step, line in evaluations(trainer).items()}
    assert all(slack < 0 for slack in slacks.values())
    assert trainer.state.best_global_step == max(slacks, key=slacks.get)


def test_without_thresholds_it_is_the_primary_objective(tmp_path):
    trainer = drifting(tmp_path, thresholds={}, max_steps=3)
    trainer.train()
    for line in evaluations(trainer).values():
        assert line["eval_feasible_primary"] == line["eval_satisfaction/helpful"]


def test_training_stops_after_so_many_evaluations_without_a_better_one(tmp_path):
    trainer = drifting(tmp_path, early_stopping_patience=2, max_steps=30)
    trainer.train()
    best = trainer.state.best_global_step
    assert trainer.state.global_step == best + 2 < 30


def test_a_resumed_run_stops_early_where_the_undisturbed_one_did(tmp_path):
    first = drifting(tmp_path, early_stopping_patience=3, max_steps=30)
    first.train()
    end = first.state.global_step
    resumed = drifting(tmp_path, early_stopping_patience=3, max_steps=30)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{end - 1}"))
    assert resumed.state.global_step == end


def test_another_metric_can_be_named(tmp_path):
    assert make_config(tmp_path).metric_for_best_model is None
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    config = make_config(tmp_path, **options)
    assert (config.metric_for_best_model, config.greater_is_better) == ("feasible_primary", True)
    config = make_config(tmp_path, **options, metric_for_best_model="satisfaction/brief")
    assert config.metric_for_best_model == "satisfaction/brief"


def test_early_stopping_needs_evaluations(tmp_path):
    with pytest.raises(ValueError, match=r"^early_stopping_patience: expected eval_strategy steps or epoch with it"):
        make_config(tmp_path, early_stopping_patience=2)
    with pytest.raises(ValueError, match=r"^early_stopping_patience: expected a number in \[1, inf\); got 0"):
        make_config(tmp_path, early_stopping_patience=0, eval_strategy="epoch")


def test_offloading_activations_from_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^gradient_checkpointing_kwargs: expected offload=False on a CPU"):
        make_config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"offload": True})


@pytest.mark.gpu
def test_offloaded_activations_leave_the_policy_as_it_would_be(tmp_path):
    def run(**changes):
        trainer = make_trainer(tmp_path, max_steps=1, use_cpu=False, gradient_checkpointing=True, **changes)
        trainer.train()
        return {name: value.detach().cpu() for name, value in trainer.model.named_parameters()}

    kept, moved = run(), run(gradient_checkpointing_kwargs={"offload": True})
    assert all(torch.equal(kept[name], moved[name]) for name in kept)


def test_multipliers_and_slacks_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = drifting(
        tmp_path,
        report_to="tensorboard",
        max_steps=3,
        dual_dataset=make_dual_data(),
        dual_steps=1,
        dual_effective_prompts=1,
    )
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for tag, key in (
        ("train/multiplier/brief", "multiplier/brief"),
        ("train/in_sample/satisfaction/helpful", "in_sample/satisfaction/helpful"),
        ("train/dual/slack/brief", "dual/slack/brief"),
        ("eval/slack/brief", "eval_slack/brief"),
        ("eval/feasible_primary", "eval_feasible_primary"),
    ):
        logged = [(line["step"], line[key]) for line in trainer.state.log_history if key in line]
        # A multiplier stands in the line of a dual step and in that of the loss.
        assert len(dict(logged)) == 3
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in logged
        ]


# ---------------------------------------------------------------------------------------------- several evaluation sets


def test_of_several_evaluation_sets_the_least_decides(tmp_path):
    sets = {"own": make_data(), "other": make_data(6, seed=9)}
    trainer = drifting(tmp_path, eval_dataset=sets, early_stopping_patience=2, max_steps=6)
    trainer.train()
    history = trainer.state.log_history
    own, other, both = (
        {line["step"]: line[key] for line in history if key in line}
        for key in ("eval_own_feasible_primary", "eval_other_feasible_primary", "eval_feasible_primary")
    )
    assert both
    assert both == {step: min(own[step], other[step]) for step in both}
    best = trainer.state.best_global_step
    assert best == max(both, key=both.get)
    assert trainer.state.global_step == min(best + 2, 6)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    line = next(line for line in history if line["step"] == best and "eval_other_satisfaction/helpful" in line)
    assert f"| Held out: other | helpful {line['eval_other_satisfaction/helpful']:.4f} ±" in card


def test_one_of_several_evaluation_sets_can_decide_and_a_metric_of_none_is_refused(tmp_path):
    sets = {"own": make_data(), "other": make_data(3, seed=9)}
    trainer = drifting(
        tmp_path, eval_dataset=sets, max_steps=2, metric_for_best_model="other_loss", early_stopping_patience=2
    )
    trainer.train()
    found = {line["step"]: line["eval_other_loss"] for line in trainer.state.log_history if "eval_other_loss" in line}
    assert trainer.state.best_global_step == min(found, key=found.get)
    with pytest.raises(
        ValueError, match=r"metric_for_best_model: expected feasible_primary or .* as own_loss; got 'loss'"
    ):
        drifting(tmp_path, eval_dataset=sets, metric_for_best_model="loss")


# ----------------------------------------------------------------------------------------------- labels to measure with


def labelled(**preference):
    pair = PreferencePair(0, 1, preference)
    return PreferenceData.from_examples([PreferenceExample(f"w{i}", (" w2", " w3"), (pair,)) for i in range(3)])


OTHER, PART = labelled(kind=1.0), labelled(helpful=1.0, brief=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval_dataset": OTHER, "load_best_model_at_end": False},
            "^eval_dataset: expected labels of helpful, brief; got",
        ),
        (
            {"eval_dataset": PART},
            "^eval_dataset: expected .* by which the best checkpoint is chosen; got none of brief",
        ),
        (
            {"eval_dataset": {"own": make_data(), "part": PART}},
            r"^eval_dataset\['part'\]: expected .* is chosen; got none of brief, but those of helpful",
        ),
        (
            {"dual_dataset": PART, "eval_dataset": make_data()},
            "^dual_dataset: expected .* they move; got none of brief",
        ),
        (
            {"dual_dataset": OTHER, "eval_dataset": None},
            "^dual_dataset: expected .* got none of brief, but those of kind",
        ),
    ],
)
def test_data_without_the_labels_that_are_measured_on_them_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        drifting(tmp_path, **changes)


def test_what_cannot_be_measured_and_decides_nothing_is_named(tmp_path, caplog):
    sets = {"own": make_data(), "part": PART}
    drifting(tmp_path, eval_dataset=sets, metric_for_best_model="own_feasible_primary")
    assert "eval_part: brief cannot be measured, as no pair has a label of it" in caplog.messages
    assert not any(line.startswith("eval_own: ") for line in caplog.messages)


def test_data_of_a_later_evaluation_are_looked_at_before_it(tmp_path):
    trainer = make_trainer(tmp_path, make_model("gpt2"), reference="model", load_best_model_at_end=False)
    with pytest.raises(ValueError, match="eval_dataset: expected labels of helpful, brief; got those of kind"):
        trainer.evaluate(OTHER)
    pair = PreferencePair(0, 1, {"helpful": 1.0})
    long = PreferenceExample("w1 " * 70, (" w2", " w3"), (pair,), id="long")
    with pytest.raises(DataError, match="eval:1: example long: 72 tokens, more than the model's 64 positions"):
        trainer.evaluate([long])
    trainer.processing_class.add_tokens(["<new>", "<newer>"])
    beyond = PreferenceExample("w1 <newer>", (" w2", " w3"), (pair,), id="new")
    with pytest.raises(ValueError, match=r"expected token ids below 64.*'<newer>'.* in example new, row 1 of eval"):
        trainer.evaluate({"a": [beyond], "b": PART})
    assert trainer.evaluate(PART)["eval_kl"] == pytest.approx(0, abs=1e-6)
