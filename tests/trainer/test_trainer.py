"""The training loop: exact accumulation, references, multipliers, logs, evaluation, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from trainer_samples import (
    STEERED,
    lora,
    make_config,
    make_data,
    make_dual_data,
    make_model,
    make_tokenizer,
    make_trainer,
    record,
)
from transformers import TrainerCallback

from mopo_kernels import naive
from mopo_kernels.data import (
    DataError,
    PreferenceCollator,
    PreferenceData,
    PreferenceExample,
    PreferencePair,
    load_preferences,
    win_rates,
)
from mopo_kernels.dual import ThresholdError, solve_labels
from mopo_kernels.trainer import MOPOConfig, MOPOTrainer
from mopo_kernels.trainer.batch_layout import take_layout
from mopo_kernels.trainer.metrics import Statistics, importance_sums

DOUBLE = torch.float64
DEMO = Path(__file__).parents[2] / "examples" / "demo" / "data" / "preferences.jsonl"


@pytest.mark.parametrize("loss_type", ["regression", "cloning", "sigmoid"])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(loss_type, tmp_path):
    """4 x 1 prompt, 2 x 2 and 1 x 4: prompts differ in pairs, tokens and weights. In fp64, to ask for 1e-12."""
    data = make_data(4)
    assert len({len(example.pairs) for example in data}) > 1
    runs = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            tmp_path / f"{batch}",
            make_model(dtype=DOUBLE),
            data,
            loss_type=loss_type,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            max_grad_norm=0.0,
            optim="sgd",
            thresholds={"brief": 0.49},
            initial_multiplier={"brief": 0.3},
            reference="model",
            dual_dataset=make_dual_data(4),
            **STEERED,
        )
        runs.append((record(trainer), trainer.state.log_history))
    whole, logs = runs[0]
    for recorder, history in runs[1:]:
        for expected, found in zip(whole.gradients, recorder.gradients, strict=True):
            scale = max(float(value.abs().max()) for value in expected.values())
            for name, value in expected.items():
                assert float((found[name] - value).abs().max()) <= 1e-12 * scale, name
        # Multipliers see the same policy.
        assert [m["brief"] for m in recorder.multipliers] == pytest.approx(
            [m["brief"] for m in whole.multipliers], rel=1e-9
        )
        lines = [[line for line in log if "loss" in line][1] for log in (history, logs)]
        for key in (
            *("loss", "margin", "kl", "effective_sample_size"),
            *("in_sample/satisfaction/helpful", "in_sample/standard_error/helpful"),
        ):
            assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-6), key
    assert whole.multipliers[0]["brief"] != whole.multipliers[1]["brief"] != 0.3


def with_margins(data, kept=lambda place: True):
    """Every pair with a margin of its own, exact in fp32, or those that are kept."""
    rows, place = [], 0
    for example in data:
        pairs = []
        for pair in example.pairs:
            place += 1
            pairs.append(replace(pair, margin=(place % 7 - 3) / 4) if kept(place) else pair)
        rows.append(replace(example, pairs=tuple(pairs)))
    return PreferenceData.from_examples(rows, data.objectives)


@pytest.mark.parametrize(("layout", "error"), [("never", 1e-12), ("always", 2e-7)], ids=["padded", "shared"])
def test_a_step_with_margins_has_the_oracles_loss_and_gradient(layout, error, tmp_path):
    """MODPO: one weight, tau over that weight, and the others' rewards as margins; in fp64, by the model's logits.

    Llama's norms are in fp32 whatever the model's dtype, which shows where the rows are others than the oracle's.
    """
    data = with_margins(make_data(4), kept=lambda place: place % 3)
    batch_size = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "shared_prompts": layout}
    settings = {"loss_type": "sigmoid", "thresholds": None, "reference": "model", "max_grad_norm": 0.0, **batch_size}

    def step(data):
        trainer = make_trainer(tmp_path, make_model(dtype=DOUBLE), data, max_steps=1, learning_rate=1e-3, **settings)
        return record(trainer).gradients[0], trainer.state.log_history[0]["loss"]

    found, loss = step(data)
    model = make_model(dtype=DOUBLE)
    rows = PreferenceCollator(make_tokenizer(), data.objectives)(list(data))
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
    labels = rows["labels"][:, 1:]
    token = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logprob = (token * (labels != -100)).sum(1)
    expected = naive.mopo_loss(
        logprob,
        logprob.detach(),
        torch.tensor([[offset + index for index in (pair.i, pair.j)] for offset, pair in placed(data)]),
        rows["preference"].double(),
        torch.tensor([1.0, 0.0], dtype=DOUBLE),
        tau=0.5,
        loss_type="sigmoid",
        pair_weight=rows["pair_weight"].double(),
        margin=torch.tensor([pair.margin or 0.0 for _, pair in placed(data)], dtype=DOUBLE),
    ).loss
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    scale = max(float(value.abs().max()) for value in gradients.values())
    for name, value in gradients.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=error * scale, msg=name)
    without, _ = step(make_data(4))
    assert max(float((without[name] - value).abs().max()) for name, value in found.items()) > 1e-3 * scale
    swapped = PreferenceData.from_examples(
        [replace(example, pairs=tuple(map(the_other_way_round, example.pairs))) for example in data], data.objectives
    )
    for name, value in step(swapped)[0].items():
        torch.testing.assert_close(value, found[name], rtol=1e-9, atol=error * scale, msg=name)


def placed(data):
    """Every pair, with where its example's responses begin among all."""
    offset = 0
    for example in data:
        yield from ((offset, pair) for pair in example.pairs)
        offset += len(example.responses)


def the_other_way_round(pair):
    preference = {name: None if value is None else 1 - value for name, value in pair.preference.items()}
    return PreferencePair(pair.j, pair.i, preference, None if pair.margin is None else -pair.margin)


@pytest.mark.parametrize("loss_type", ["regression", "cloning"])
def test_margins_are_refused_where_the_loss_ignores_them(loss_type, tmp_path):
    data = with_margins(make_data(4))
    message = f"dataset: expected pairs without a margin, which only .* got some with one and loss_type '{loss_type}'"
    with pytest.raises(ValueError, match=f"^train_{message}"):
        make_trainer(tmp_path, data=data, loss_type=loss_type)
    with pytest.raises(ValueError, match=f"^eval_{message}"):
        make_trainer(tmp_path, eval_dataset={"held": data}, loss_type=loss_type)
    bare = with_margins(make_data(4), kept=lambda place: place == 1)
    assert (bare.has_margins, bare.select([1, 2]).has_margins, make_data(4).has_margins) == (True, False, False)
    make_trainer(tmp_path, data=bare.select([1, 2]), loss_type=loss_type)


def test_a_step_short_of_micro_batches_is_normalised_by_what_it_has(tmp_path):
    """5 prompts, 2 a step by accumulation: the last step of the epoch has one."""
    data = make_data(5)
    trainer = make_trainer(
        tmp_path,
        make_model(dtype=DOUBLE),
        data,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        reference="model",
        initial_multiplier="zero",
    )
    recorder = record(trainer)
    collator = trainer.data_collator
    for part, found in zip(([0, 1], [2, 3], [4]), recorder.gradients, strict=True):
        trainer.model.zero_grad()
        batch = collator([data[i] for i in part])
        trainer.model(**batch, objective_weight=trainer.dual.weight)["loss"].backward()
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_one_dual_step_follows_every_so_many_optimiser_steps_on_the_dual_data_alone(tmp_path):
    trainer = make_trainer(
        tmp_path,
        data=make_data(4),
        dual_dataset=make_dual_data(4),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=6,
        thresholds={"brief": 0.6},
        initial_multiplier="zero",
        **STEERED | {"dual_steps": 2, "dual_lr": 0.5},
    )
    recorder = record(trainer)
    expected, history = 0.0, trainer.state.log_history
    first = next(line for line in history if "loss" in line)
    assert first["in_sample/satisfaction/brief"] == pytest.approx(0.5, abs=1e-6), "the policy starts at the reference"
    measured = {line["step"]: line for line in history if "dual/satisfaction/brief" in line}
    assert list(measured) == [2, 4, 6]
    for step, multiplier in enumerate(recorder.multipliers, 1):
        if (line := measured.get(step)) is not None:
            value = line["dual/satisfaction/brief"]
            expected = max(0.0, expected + 0.5 * (0.6 - value))
            assert line["multiplier/brief"] == multiplier["brief"]
            assert line["dual/slack/brief"] == pytest.approx(value - 0.6)
            assert (line["threshold/brief"], line["dual/lr/brief"]) == (0.6, 0.5)
        assert multiplier["brief"] == pytest.approx(expected, rel=1e-12)
    assert expected > 0
    assert trainer.measurement.satisfaction["brief"] == trainer.dual.smoothed["brief"]


def test_the_constraint_moves_the_policy(tmp_path):
    """Unconstrained, brevity falls well below parity; under a threshold it ends near it and helpfulness pays for it."""
    values = {}
    for name, thresholds in (("free", None), ("held", {"brief": 0.5})):
        trainer = make_trainer(
            tmp_path / name,
            data=make_data(8),
            thresholds=thresholds,
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            logging_steps=60,
        )
        trainer.train()
        values[name] = trainer.in_sample
    assert values["free"]["brief"] < 0.45
    assert values["held"]["brief"] > 0.48
    assert values["free"]["helpful"] > values["held"]["helpful"] > 0.5


def test_training_starts_at_the_exact_multipliers_of_the_labels(tmp_path):
    trainer = make_trainer(tmp_path, thresholds={"brief": 0.5})
    solution = trainer.label_solution
    assert solution is not None
    assert solution.feasible
    assert 0 < solution.multiplier["brief"] < 10
    assert trainer.dual.multiplier == solution.multiplier
    assert make_trainer(tmp_path, initial_multiplier="zero").dual.multiplier == {"brief": 0.0}
    assert make_trainer(tmp_path, initial_multiplier="brief=0.25").dual.multiplier == {"brief": 0.25}


def test_thresholds_that_the_labels_cannot_meet_are_reported_before_training(tmp_path, caplog):
    told = (
        r"^on the training labels \(estimator pair, dual_max 10\): threshold brief >= 0\.99 cannot be met: 0\.\d+ with"
    )
    with pytest.raises(ThresholdError, match=told) as caught:
        make_trainer(tmp_path, thresholds={"brief": 0.99})
    assert [unmet.objective for unmet in caught.value.unmet] == ["brief"]
    with pytest.raises(
        ThresholdError, match=r"; on these responses every policy misses some threshold by at least 0\."
    ):
        make_trainer(tmp_path, thresholds={"brief": 0.99}, estimator="snis")
    trainer = make_trainer(tmp_path, thresholds={"brief": 0.99}, on_infeasible="warn")
    assert "threshold brief >= 0.99 cannot be met" in caplog.text
    assert trainer.dual.multiplier["brief"] == pytest.approx(10.0, rel=0.1)


def test_a_search_for_multipliers_that_did_not_converge_is_told_and_does_not_stop_training(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path,
        data=load_preferences(DEMO),
        primary="detail",
        thresholds={"plain": 0.75, "brevity": 0.75},
        tau=0.1,
        dual_max=1000.0,
    )
    assert "(estimator pair, dual_max 1000): the multipliers are approximate (residual 4.4e-03), plain" in caplog.text
    assert trainer.dual.multiplier == trainer.label_solution.multiplier
    assert not trainer.label_solution.feasible


def test_the_label_solution_counts_examples_by_their_weight(tmp_path):
    data = make_data(8)
    rates = win_rates(data)
    arguments = (rates.win_rate, rates.reference, data.objectives, "helpful", {"brief": 0.5}, 0.5)
    weighted = solve_labels(*arguments, estimator="snis", prompt_weight=rates.prompt_weight)
    trainer = make_trainer(tmp_path, data=data, thresholds={"brief": 0.5}, estimator="snis")
    assert trainer.label_solution == weighted
    assert weighted.multiplier["brief"] > 0
    assert weighted != solve_labels(*arguments, estimator="snis")


def test_a_threshold_that_stays_unmet_at_the_largest_multiplier_stops_training_with_a_checkpoint(tmp_path):
    settings = STEERED | {
        "thresholds": {"brief": 0.95},
        "initial_multiplier": "zero",
        "dual_max": 0.1,
        "dual_lr": 1.0,
        "dual_patience": 3,
        "max_steps": 20,
        "dual_dataset": make_dual_data(),
    }
    trainer = make_trainer(tmp_path / "error", **settings)
    with pytest.raises(ThresholdError, match=r"threshold brief >= 0\.95 cannot be met: best seen 0\.\d+"):
        trainer.train()
    assert trainer.state.global_step < 20
    assert (tmp_path / "error" / f"checkpoint-{trainer.state.global_step}" / "mopo_manifest.json").is_file()
    trainer = make_trainer(tmp_path / "warn", on_infeasible="warn", **settings)
    trainer.train()
    assert trainer.state.global_step == 20


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_precomputed_and_live_references_are_the_same_policy(kind, tmp_path):
    """Log-probabilities of the starting weights, computed before training or during it, give the same run."""
    finals = []
    for name in ("precomputed", "model"):
        model = make_model()
        if kind == "lora":
            model = lora(model)
        trainer = make_trainer(
            tmp_path / name, model, reference=name, optim="sgd", max_steps=4, eval_dataset=make_data(3, seed=9)
        )
        trainer.train()
        finals.append((trainer, trainer.evaluate()))
    for (name, first), (_, second) in zip(
        finals[0][0].model.named_parameters(), finals[1][0].model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5, msg=name)
    assert finals[0][1]["eval_kl"] == pytest.approx(finals[1][1]["eval_kl"], rel=1e-3)
    assert finals[0][1]["eval_kl"] > 1e-4
    assert "ref_logprob" in finals[0][0].train_dataset.dataset.column_names
    assert "ref_logprob" not in finals[1][0].train_dataset.dataset.column_names


def test_reference_log_probabilities_are_the_models_own(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, reference="precomputed")
    plain = make_data()
    trainer._prepare_references()
    collator = PreferenceCollator(make_tokenizer(), plain.objectives)
    for example in trainer.train_dataset:
        batch = collator([example])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        token = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(batch["ref_logprob"], (token * (labels != -100)).sum(1), rtol=1e-5, atol=1e-4)


def test_a_live_copy_evaluates_data_that_came_later_and_precomputed_refuses_it(tmp_path):
    later = make_data(2, seed=4)
    trainer = make_trainer(tmp_path / "model", reference="model")
    trainer.train()
    assert trainer.evaluate(later)["eval_kl"] > 0
    trainer = make_trainer(tmp_path / "precomputed", reference="precomputed")
    trainer.train()
    with pytest.raises(ValueError, match="no copy of the starting weights is kept"):
        trainer.evaluate(later)


def test_weights_changed_before_the_reference_pass_are_noticed(tmp_path):
    trainer = make_trainer(tmp_path, reference="precomputed")
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(1.0)
    with pytest.raises(ValueError, match="the weights it had when the trainer was made"):
        trainer.train()


@pytest.mark.parametrize(("max_steps", "expected"), [(1, False), (4, True)])
def test_auto_computes_before_training_only_what_lora_training_will_use(max_steps, expected, tmp_path):
    trainer = make_trainer(tmp_path, lora(make_model()), data=make_data(8), max_steps=max_steps)
    trainer.train()
    assert ("ref_logprob" in trainer.train_dataset.dataset.column_names) is expected
    full = make_trainer(tmp_path / "full", max_steps=1)
    full.train()
    assert "ref_logprob" in full.train_dataset.dataset.column_names


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_lagged_reference_is_the_policy_as_it_was_and_thresholds_follow(kind, tmp_path):
    model = make_model() if kind == "full" else lora(make_model())
    trainer = make_trainer(
        tmp_path,
        model,
        reference="model",
        reference_update_steps=2,
        threshold_relaxation=0.9,
        max_steps=5,
        dual_dataset=make_dual_data(),
        # Longer than the run: a relaxation makes a dual step of its own, as it needs the value of the moment.
        **STEERED | {"dual_steps": 100},
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    seen: list[tuple[Any, ...]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            snapshot = trainer.reference.snapshot
            seen.append(
                (
                    weights,
                    None if snapshot is None else {n: v.clone() for n, v in snapshot.items()},
                    trainer.dual.threshold["brief"],
                    trainer.dual.smoothed.get("brief"),
                )
            )

    trainer.add_callback(Watch())
    trainer.train()
    assert seen[0][1] is None
    for step, source in ((2, 2), (3, 2), (4, 4), (5, 4)):
        _, snapshot, threshold, _ = seen[step - 1]
        weights, _, _, smoothed = seen[source - 1]
        assert all(torch.equal(snapshot[name], value) for name, value in weights.items())
        assert threshold == 0.9 * smoothed
    assert seen[0][2] == 0.4
    # KL to the current reference starts afresh, to the first it goes on from the start.
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[2]["kl"] < 1e-6 < lines[2]["kl_first"]
    assert lines[1]["kl"] == lines[1]["kl_first"]
    batch = trainer.data_collator([make_data()[0]])
    arguments = (model, take_layout(dict(batch)))
    with torch.no_grad():
        first, current = model._mopo_policy.reference_logprob(*arguments, None)
        live = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
        for weights, expected in ((start, first), (seen[3][0], current)):
            for name, parameter in model.named_parameters():
                if name in weights:
                    parameter.data = weights[name].clone()
            torch.testing.assert_close(model._mopo_policy.sequence_logprob(*arguments), expected)
        for name, value in live.items():
            dict(model.named_parameters())[name].data = value


def test_under_a_lagged_reference_satisfaction_is_measured_from_the_first(tmp_path):
    trainer = make_trainer(tmp_path, reference="model", reference_update_steps=1, max_steps=3)
    trainer.train()
    model = trainer.model
    batch = trainer.data_collator([make_data()[i] for i in range(4)])
    policy = model._mopo_policy
    with torch.no_grad():
        output = model(**batch, objective_weight=trainer.dual.weight)
        layout = take_layout(dict(batch))
        logprob = policy.sequence_logprob(model, layout)
        first, current = policy.reference_logprob(model, layout, None)
    expected, _ = naive.satisfaction(logprob - first, batch["pairs"], batch["preference"], batch["pair_weight"])
    found = trainer._statistics.satisfaction(output["statistics"])[0]
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)
    other, _ = naive.satisfaction(logprob - current, batch["pairs"], batch["preference"], batch["pair_weight"])
    assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.parametrize("estimator", ["pair", "snis", "closed_form"])
def test_logged_numbers_are_those_of_the_oracle(estimator, tmp_path):
    """One batch that is the whole data set, evaluated after training, against naive.py in fp64."""
    data = make_data(6)
    trainer = make_trainer(tmp_path, data=data, reference="model", estimator=estimator, max_steps=6, tau=0.3)
    trainer.train()
    metrics = trainer.evaluate(data)
    model, batch = trainer.model, trainer.data_collator(list(data))
    policy = model._mopo_policy
    arguments = (model, take_layout(dict(batch)))
    with torch.no_grad():
        r = (policy.sequence_logprob(*arguments) - policy.reference_logprob(*arguments, None)[0]).double()
    weight, preference = batch["pair_weight"].double(), batch["preference"].double()
    expected = naive.mopo_loss(
        r,
        torch.zeros_like(r),
        batch["pairs"],
        preference,
        trainer.dual.weight.double(),
        tau=0.3,
        pair_weight=weight,
        estimator=estimator,
        prompt_index=batch["prompt_index"],
    )
    nothing = naive.mopo_loss(
        torch.zeros_like(r),
        torch.zeros_like(r),
        batch["pairs"],
        preference,
        trainer.dual.weight.double(),
        tau=0.3,
        pair_weight=weight,
    )
    target = naive.pair_target(preference, trainer.dual.weight.double(), 0.3)
    oriented = (weight * target.sign() * expected.margin).sum() / weight[target != 0].sum()
    share = torch.softmax(r, 0)
    kl = (share * (share * len(r)).log()).sum()
    for key, value in {
        "loss": expected.loss,
        "satisfaction/helpful": expected.satisfaction[0],
        "satisfaction/brief": expected.satisfaction[1],
        "slack/brief": expected.satisfaction[1] - trainer.dual.threshold["brief"],
        "margin": oriented,
        "r_squared": 1 - expected.loss / nothing.loss,
        "kl": kl,
        "kl_first": kl,
    }.items():
        assert metrics[f"eval_{key}"] == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
    # Batches of 3 prompts are summed, not averaged; so the size is that of all of them.
    assert metrics["eval_effective_sample_size"] == pytest.approx(float(expected.effective_sample_size), rel=1e-4)


def test_the_kl_estimates_are_those_of_the_policy_when_the_first_reference_wrote_the_responses():
    """200,000 draws from a known first reference: both estimates against the closed form."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 12, generator=generator, dtype=DOUBLE)
    first = torch.softmax(noise[0], 0)
    lagged = torch.softmax(first.log() + 0.7 * noise[1], 0)
    policy = torch.softmax(first.log() + 0.7 * noise[1] + 0.7 * noise[2], 0)
    draws = torch.multinomial(first, 200_000, replacement=True, generator=generator)
    statistics = Statistics(("helpful",))
    scalars = dict.fromkeys(statistics.scalars, torch.ones(()))
    scalars |= {"responses": torch.tensor(len(draws))}
    scalars |= importance_sums((policy / first).log()[draws], (policy / lagged).log()[draws])
    summary = statistics.summary(statistics.pack(torch.ones(6, 1), scalars))
    assert summary["kl_first"] == pytest.approx(float((policy * (policy / first).log()).sum()), rel=0.02)
    assert summary["kl"] == pytest.approx(float((policy * (policy / lagged).log()).sum()), rel=0.02)
    assert abs(summary["kl"] - summary["kl_first"]) > 0.1

    # A policy that is the current reference has KL 0 to it, on however few responses.
    scalars |= {"responses": torch.tensor(2)} | importance_sums(torch.tensor([-1.0, -2.0]), torch.zeros(2))
    summary = statistics.summary(statistics.pack(torch.ones(6, 1), scalars))
    assert summary["kl"] == pytest.approx(0.0, abs=1e-12)
    assert summary["kl_first"] > 0.1


def test_every_promised_number_is_logged(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        eval_dataset=make_data(3, seed=9),
        dual_dataset=make_dual_data(),
        **STEERED,
    )
    trainer.train()
    dual = [line for line in trainer.state.log_history if "dual/satisfaction/brief" in line]
    assert [line["step"] for line in dual] == [1, 2, 3, 4]
    for line in dual:
        for key in (
            *("multiplier/brief", "threshold/brief", "dual/slack/brief", "dual/lr/brief", "dual/satisfaction/helpful"),
            "dual/r_squared",
            *(f"dual/{kind}/{name}" for kind in ("standard_error", "effective_prompts") for name in trainer.objectives),
        ):
            assert math.isfinite(line[key]), key
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        for key in (
            "multiplier/brief",
            "threshold/brief",
            "in_sample/satisfaction/brief",
            "in_sample/satisfaction/helpful",
            "in_sample/standard_error/brief",
            "in_sample/r_squared",
            "margin",
            "kl",
            "kl_first",
            "effective_sample_size",
            "tokens_per_second",
            "scored_tokens_per_second",
            "peak_memory_mib",
        ):
            assert math.isfinite(line[key]), key
        assert line["tokens_per_second"] > line["scored_tokens_per_second"] > 0
        assert 10 < line["peak_memory_mib"] < 1e5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss_type": "sigmoid", "tau": 0.5},
        {"label_rate": {"helpful": 0.5}},
        {"length_normalize": True, "tau": 2.0},
        {"loss_type": "cloning", "estimator": "closed_form"},
    ],
    ids=["regression", "sigmoid", "label-rate", "length", "cloning"],
)
def test_the_share_of_the_pairs_explained_is_the_same_of_dual_and_evaluation_data(changes, tmp_path):
    """One data set looked at both ways under the same weights, against the loss itself; 0 for the reference."""
    data = make_dual_data(6)
    settings = STEERED | {"dual_warmup_steps": 1000, "estimator": "snis", "max_steps": 3, "logging_steps": 1} | changes
    trainer = make_trainer(tmp_path, dual_dataset=data, reference="model", learning_rate=1e-2, **settings)
    before = trainer.evaluate(data)
    trainer.train()
    after = trainer.evaluate(data)
    measured = [line for line in trainer.state.log_history if "dual/satisfaction/brief" in line][-1]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    if changes.get("loss_type") == "cloning":
        assert "eval_r_squared" not in after
        assert "dual/r_squared" not in measured
        assert all("in_sample/r_squared" not in line for line in lines)
        return
    assert before["eval_r_squared"] == pytest.approx(0.0, abs=1e-6)
    assert after["eval_r_squared"] == pytest.approx(1 - after["eval_loss"] / before["eval_loss"], abs=1e-5)
    assert abs(after["eval_r_squared"]) > 1e-4
    assert measured["dual/r_squared"] == pytest.approx(after["eval_r_squared"], abs=1e-5)
    assert lines[0]["in_sample/r_squared"] == pytest.approx(0.0, abs=1e-6)


def test_a_batch_whose_pairs_all_weigh_nothing_adds_nothing(tmp_path):
    """As repeats do, with which the last round of several ranks is filled up."""
    trainer = make_trainer(tmp_path, reference="model")
    batch = trainer.data_collator(list(make_data(2)))
    weightless = {**batch, "pair_weight": torch.zeros_like(batch["pair_weight"])}
    with torch.no_grad():
        output = trainer.model(**weightless, objective_weight=trainer.dual.weight)
    assert trainer._statistics.scalar(output["statistics"], "reference_loss") == 0


def test_the_effective_sample_size_is_that_of_a_step_however_many_a_log_line_covers(tmp_path):
    data = make_data(8)
    trainer = make_trainer(
        tmp_path, data=data, learning_rate=0.0, max_steps=4, logging_steps=4, train_sampling_strategy="sequential"
    )
    trainer.train()
    responses = sum(len(example.responses) for example in data)
    assert trainer.state.log_history[0]["effective_sample_size"] == pytest.approx(responses / 4, rel=1e-6)


def test_the_effective_sample_size_of_a_log_line_is_the_mean_of_its_steps(tmp_path):
    """Weights differ from step to step, so that the pooled size is not the sum of the steps' own."""
    sizes = {}
    for every in (1, 4):
        trainer = make_trainer(
            tmp_path / f"{every}", estimator="snis", tau=0.05, learning_rate=0.1, max_steps=4, logging_steps=every
        )
        trainer.train()
        sizes[every] = [line["effective_sample_size"] for line in trainer.state.log_history if "loss" in line]
    assert sizes[4] == [pytest.approx(sum(sizes[1]) / 4, rel=1e-12)]
    assert min(sizes[1]) >= 1 - 1e-9
    assert max(sizes[1]) > 1.5 * min(sizes[1])


def test_held_out_satisfaction_can_choose_the_best_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_data(4, seed=9),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="satisfaction/helpful",
        greater_is_better=True,
    )
    trainer.train()
    seen = {
        line["step"]: line["eval_satisfaction/helpful"]
        for line in trainer.state.log_history
        if "eval_satisfaction/helpful" in line
    }
    assert set(seen) == {2, 4, 6}
    assert trainer.state.best_metric == max(seen.values())
    assert trainer.evaluate()["eval_satisfaction/helpful"] == pytest.approx(max(seen.values()), abs=1e-5)


def test_several_held_out_sets_are_told_apart(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"one": make_data(3, seed=2), "two": make_data(3, seed=3)})
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_one_satisfaction/brief"] != metrics["eval_two_satisfaction/brief"]


def test_fixed_multipliers_weigh_the_loss_of_every_prompt_and_never_move(tmp_path):
    """Bit for bit the run whose multipliers start there and stand, for want of dual data; nothing is held out."""
    fixed = make_trainer(
        tmp_path / "fixed", thresholds=None, fixed_multipliers="brief=0.375", max_steps=6, reference="model"
    )
    assert fixed.dual_dataset is None
    assert len(fixed.train_dataset) == len(make_data())
    assert fixed.objective_weight.tolist() == [1.0, 0.375]
    fixed.train()
    standing = make_trainer(
        tmp_path / "standing", dual_data=0.0, initial_multiplier={"brief": 0.375}, max_steps=6, reference="model"
    )
    standing.train()
    other = make_trainer(tmp_path / "other", thresholds=None, max_steps=6, reference="model")
    other.train()
    weights = [trainer.model.state_dict() for trainer in (fixed, standing, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    lines = [line for line in fixed.state.log_history if "loss" in line]
    assert len(lines) == 6
    assert {line["multiplier/brief"] for line in lines} == {0.375}
    assert not any(key.startswith(("dual/", "threshold/")) for line in fixed.state.log_history for key in line)
    assert fixed.evaluate(make_dual_data())["eval_multiplier/brief"] == 0.375
    fixed.save_model()
    card = (tmp_path / "fixed" / "README.md").read_text(encoding="utf-8")
    assert "| brief | weighted |  | 0.3750 |" in card
    assert "the multipliers below being fixed weights; no threshold was set." in card


def test_an_unconstrained_third_objective_is_measured_and_does_not_act(tmp_path):
    trainer = make_trainer(tmp_path, thresholds=None)
    trainer.train()
    line = trainer.state.log_history[0]
    assert trainer.dual.weight.tolist() == [1.0, 0.0]
    assert "in_sample/satisfaction/brief" in line
    assert "multiplier/brief" not in line


def test_label_rates_are_measured_on_the_training_data(tmp_path):
    data = make_data(20)
    trainer = make_trainer(tmp_path, data=data, label_rate="auto")
    pairs = [pair for example in data for pair in example.pairs]
    expected = [sum(pair.preference[name] is not None for pair in pairs) / len(pairs) for name in data.objectives]
    assert trainer.model._mopo_policy.label_rate == pytest.approx(expected)
    assert max(expected) < 1
    trainer.train()


MISSING = "regression draws the margin of a pair without a label to 0"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "helpful 90.0%, brief 85.0%"),
        ({"thresholds": None}, "helpful 90.0%)"),
        ({"label_rate": "auto"}, None),
        ({"loss_type": "sigmoid"}, None),
    ],
    ids=["acting objectives", "the primary alone acts", "label_rate", "another loss"],
)
def test_labels_that_are_missing_are_told_where_they_count_as_ties(changes, told, tmp_path, caplog):
    pairs = [PreferencePair(0, 1, {"helpful": 1.0, "brief": 0.0}) for _ in range(20)]
    for index in (3, 5):
        pairs[index] = PreferencePair(0, 1, {"helpful": None, "brief": 0.0})
    for index in (1, 5, 9):
        pairs[index] = PreferencePair(0, 1, {**pairs[index].preference, "brief": None})
    data = PreferenceData.from_examples([PreferenceExample("p", ("w1", "w2 w3"), (pair,)) for pair in pairs])
    make_trainer(tmp_path, data=data, **{"initial_multiplier": "zero", **changes})
    if told is None:
        assert MISSING not in caplog.text
    else:
        assert caplog.text.count(MISSING) == 1
        assert told in caplog.text


def test_full_labels_are_passed_over_in_silence(tmp_path, caplog):
    pair = PreferencePair(0, 1, {"helpful": 1.0, "brief": 0.5})
    data = PreferenceData.from_examples([PreferenceExample("p", ("w1", "w2 w3"), (pair,))])
    make_trainer(tmp_path, data=data, initial_multiplier="zero")
    assert MISSING not in caplog.text


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory is pinned for the accelerator")
def test_training_without_an_accelerator_pins_no_memory_and_torch_has_nothing_to_say(tmp_path, recwarn):
    trainer = make_trainer(tmp_path, use_cpu=False)
    trainer.train()
    assert trainer.args.dataloader_pin_memory is False
    assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]


def test_bf16_autocast_trains_and_starts_at_the_reference(tmp_path):
    trainer = make_trainer(tmp_path, reference="precomputed", bf16=True, max_steps=3)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["in_sample/satisfaction/helpful"] == pytest.approx(0.5, abs=0.02)
    assert line["kl"] < 1e-2
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_bf16_weights_under_fp32_adapters_train(tmp_path):
    model = lora(make_model(dtype=torch.bfloat16), target_modules=["q_proj", "lm_head"])
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    make_trainer(tmp_path, model, max_steps=2).train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.requires_grad)


def test_a_collapsed_importance_estimate_is_told_once(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path,
        data=make_data(12),
        estimator="snis",
        per_device_train_batch_size=12,
        learning_rate=0.3,
        max_steps=8,
        tau=0.02,
        thresholds=None,
    )
    trainer.train()
    assert caplog.text.count("the effective sample size of the snis estimate") == 1


def test_a_diverged_policy_is_told_with_its_step(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.lm_head.weight[5, 0] = math.nan

    trainer.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match="of step 3 are not finite: the policy has diverged"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 0.0}, r"tau: expected a number in \[1e-10, 1e\+10\]; got 0\.0"),
        ({"dual_smoothing": 1.0}, r"dual_smoothing: expected a number in \[0, 1\); got 1\.0"),
        ({"dual_lr": -1.0}, r"dual_lr: .*got -1\.0"),
        ({"dual_lr": "often"}, "dual_lr: expected a number or auto; got 'often'"),
        ({"dual_data": 1.0}, r"dual_data: expected a number in \[0, 1\); got 1\.0"),
        ({"dual_steps": 0}, r"dual_steps: expected a number in \[1, inf\); got 0"),
        ({"threshold_confidence": 0.4}, r"threshold_confidence: expected a number in \[0\.5, 1\); got 0\.4"),
        ({"loss_type": "dpo"}, "loss_type: expected one of regression, cloning, sigmoid; got 'dpo'"),
        ({"estimator": "exact"}, "estimator: expected one of pair, snis, closed_form; got 'exact'"),
        ({"reference": "none"}, "reference: expected one of auto, precomputed, model; got 'none'"),
        ({"thresholds": "brief:0.4"}, r"thresholds: expected a mapping .*'brief:0\.4'"),
        ({"thresholds": "brief=high"}, "thresholds: .*got 'high' for 'brief'"),
        ({"thresholds": [0.4]}, r"thresholds: .*got \[0\.4\]"),
        ({"thresholds": {"brief": math.nan}}, r"thresholds\['brief'\]: expected a finite number"),
        ({"fixed_multipliers": "brief=0.2"}, "fixed_multipliers: expected no thresholds .*got thresholds for brief$"),
        ({"fixed_multipliers": "brief=-1", "thresholds": None}, r"fixed_multipliers\['brief'\]: .*got -1\.0"),
        ({"fixed_multipliers": "brief:1", "thresholds": None}, r"fixed_multipliers: expected a mapping"),
        ({"initial_multiplier": "brief=-1"}, r"initial_multiplier\['brief'\]: .*got -1\.0"),
        ({"initial_multiplier": {"brief": 11}}, r"from 0 to dual_max \(10\.0\); got 11\.0"),
        ({"label_rate": {"brief": 0.0}}, r"label_rate\['brief'\]: expected a share in \(0, 1\]"),
        ({"label_rate": "auto", "loss_type": "cloning"}, "label_rate: expected None with loss_type 'cloning'"),
        ({"threshold_relaxation": 0.9}, "threshold_relaxation: expected reference_update_steps with it"),
        ({"reference_update_steps": 0}, r"reference_update_steps: expected a number in \[1, inf\); got 0"),
        ({"max_ratio": 0.5}, r"max_ratio: expected a number in \[1, 1e\+10\]"),
        ({"objectives": []}, "objectives: expected at least one name"),
        ({"objectives": "helpful,helpful"}, "objectives: expected at least one name, each once"),
        ({"objectives": ["brief"], "primary": "helpful"}, "primary: expected one of brief; got 'helpful'"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
        ({"on_infeasible": "ignore"}, "on_infeasible: expected one of error, warn"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: expected False"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary": "kind"}, "primary: expected one of helpful, brief; got 'kind'"),
        ({"thresholds": {"kind": 0.4}}, "thresholds: expected objectives among helpful, brief; got 'kind'"),
        ({"thresholds": {"helpful": 0.4}}, "expected none for the primary objective 'helpful'"),
        (
            {"fixed_multipliers": {"kind": 1}, "thresholds": None},
            "fixed_multipliers: expected objectives among helpful",
        ),
        (
            {"fixed_multipliers": {"helpful": 1}, "thresholds": None},
            "fixed_multipliers: .* whose weight is 1; got 'helpf",
        ),
        ({"objectives": ["helpful", "kind"]}, "objectives: expected names among the data's helpful, brief; got kind"),
    ],
)
def test_objectives_the_data_does_not_have_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_wrong_arguments_are_refused(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="args: expected a MOPOConfig; got TrainingArguments"):
        MOPOTrainer(make_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="model: expected a model; got None"):
        MOPOTrainer(None, make_config(tmp_path), train_dataset=make_data())
    with pytest.raises(ValueError, match="compute_metrics: expected None"):
        MOPOTrainer(make_model(), make_config(tmp_path), compute_metrics=len)
    with pytest.raises(ValueError, match="processing_class: expected the tokenizer"):
        MOPOTrainer(make_model(), make_config(tmp_path), train_dataset=make_data())
    with pytest.raises(ValueError, match=r"train_dataset: expected PreferenceData.*got int"):
        make_trainer(tmp_path, data=3)
    with pytest.raises(ValueError, match="objectives: expected their names"):
        MOPOTrainer(make_model(), make_config(tmp_path), processing_class=make_tokenizer())


def test_examples_rows_and_tables_are_taken_as_they_come(tmp_path):
    data = make_data(4)
    losses = []
    rows = [example.to_dict() for example in data]
    for form in (data, list(data), rows, data.dataset, pandas.DataFrame(rows)):
        trainer = make_trainer(tmp_path, data=form, max_steps=1, reference="model")
        assert isinstance(trainer.train_dataset, PreferenceData)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert len(set(losses)) == 1


def test_over_long_examples_are_refused_with_their_name(tmp_path):
    with pytest.raises(DataError, match="more than the"):
        make_trainer(tmp_path, max_response_length=3).train()


def test_over_long_responses_can_be_cut_as_a_sampler_cuts_them(tmp_path):
    data = make_data(8)
    trainer = make_trainer(tmp_path, data=data, max_response_length=3, truncate_responses=True, max_steps=1)
    whole = PreferenceCollator(trainer.data_collator.tokenizer, data.objectives).tokenize(list(data))
    for item, uncut in zip(trainer.data_collator.tokenize(list(data)), whole, strict=True):
        assert [list(ids) for ids in item.responses] == [list(ids)[:3] for ids in uncut.responses]
    assert max(len(ids) for item in whole for ids in item.responses) > 3
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_thresholds_come_as_mapping_text_or_json(tmp_path):
    for value in ({"a": 0.25, "b": 0.5}, "a=0.25, b=0.5", '{"a": 0.25, "b": 0.5}'):
        for name in ("thresholds", "fixed_multipliers"):
            config = MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
            assert getattr(config, name) == {"a": 0.25, "b": 0.5}


@pytest.mark.parametrize("length_normalize", [False, True], ids=["sums", "a token"])
def test_chosen_and_rejected_responses_are_logged_as_trl_logs_them(length_normalize, tmp_path):
    """Of the primary objective's labels, by their own formulas: rewards are beta times log-ratios."""
    data = make_data(6)
    trainer = make_trainer(
        tmp_path,
        make_model(),
        data,
        reference="model",
        loss_type="sigmoid",
        thresholds={},
        per_device_train_batch_size=6,
        train_sampling_strategy="sequential",
        length_normalize=length_normalize,
        eval_dataset=data,
        max_steps=3,
    )
    trainer.train()
    model, batch = trainer.model, trainer.data_collator(list(data))
    policy, arguments = model._mopo_policy, (model, take_layout(dict(batch)))
    with torch.no_grad():
        logprob = policy.sequence_logprob(*arguments)
        before = policy.reference_logprob(*arguments, None)[0]
    length = torch.ones(len(logprob))
    if length_normalize:
        collated = PreferenceCollator(make_tokenizer(), data.objectives)(list(data))
        length = (collated["labels"][:, 1:] != -100).sum(1)
    reward = 0.5 * (logprob - before) / length
    rows = []
    for (i, j), label, weight in zip(
        batch["pairs"].tolist(), batch["preference"][:, 0].tolist(), batch["pair_weight"].tolist(), strict=True
    ):
        if label in (0.0, 1.0):
            won, lost = (i, j) if label else (j, i)
            margin = reward[won] - reward[lost]
            rows.append([weight, reward[won], reward[lost], margin > 0, margin, logprob[won], logprob[lost]])
    assert 0 < len(rows) < len(batch["pairs"]), "some are ties or have no label"
    table = torch.tensor(rows, dtype=DOUBLE)
    expected = (table[:, :1] * table[:, 1:]).sum(0) / table[:, 0].sum()
    names = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
    names += ["logps/chosen", "logps/rejected"]
    found = trainer.evaluate()
    assert [found[f"eval_{name}"] for name in names] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    first = next(line for line in trainer.state.log_history if "loss" in line)
    assert set(names) <= set(first)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)


def test_the_names_are_trls():
    source = Path(pytest.importorskip("trl").__file__).parent / "trainer" / "dpo_trainer.py"
    text = source.read_text()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert f'["{name}"]' in text
