"""What moves the multipliers: prompts that the loss never fits, how sure a figure is, and the step that it allows."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from trainer_samples import (
    STEERED,
    WORDS,
    brevity,
    lora,
    make_config,
    make_data,
    make_dual_data,
    make_model,
    make_tokenizer,
    make_trainer,
)
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

import mopo_kernels.trainer.forward as forward
from mopo_kernels import naive
from mopo_kernels.data import PreferenceCollator, PreferenceData, PreferenceExample, PreferencePair, win_rates
from mopo_kernels.data.dataset import prompt_key
from mopo_kernels.dual import DualAscent, solve_labels
from mopo_kernels.evaluation import sample_responses, win_rate
from mopo_kernels.trainer.control import Controller, Measurement, gain

DOUBLE = torch.float64
STILL = STEERED | {"dual_warmup_steps": 1000}


def lines(trainer):
    return [line for line in trainer.state.log_history if "dual/satisfaction/brief" in line]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same(first, second):
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on more threads than there are cores to spare take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- how sure a value is


def test_the_standard_error_is_that_of_a_bootstrap_by_prompt():
    """60 prompts of unequal weight whose parts are correlated; 4,000 resamples know the error to 1%."""
    generator = torch.Generator().manual_seed(0)
    total = torch.exp(0.7 * torch.randn(60, 2, generator=generator, dtype=DOUBLE))
    share = torch.sigmoid(torch.randn(60, 2, generator=generator, dtype=DOUBLE) + 0.5 * total)
    moments = naive.ratio_moments(total * share, total)
    value, error, effective = naive.ratio_estimate(moments)
    drawn = torch.randint(60, (4000, 60), generator=generator)
    resampled = (total * share)[drawn].sum(1) / total[drawn].sum(1)
    torch.testing.assert_close(value, (total * share).sum(0) / total.sum(0))
    torch.testing.assert_close(error, resampled.std(0), rtol=0.05, atol=0)
    torch.testing.assert_close(effective, total.sum(0).square() / total.square().sum(0))
    # Batches and ranks merge by addition.
    parts = sum(naive.ratio_moments((total * share)[rows], total[rows]) for rows in torch.arange(60).split(7))
    torch.testing.assert_close(naive.ratio_estimate(parts)[1], error)


def test_no_error_is_known_from_one_prompt_and_no_value_from_none():
    value, error, effective = naive.ratio_estimate(naive.ratio_moments(*torch.tensor([[[0.3, 0]], [[1, 0]]])))
    assert value[0] == pytest.approx(0.3)
    assert math.isnan(value[1])
    assert error.isnan().all()
    assert effective.tolist() == [1, 0]


def test_evaluation_reports_standard_errors_by_prompt(tmp_path):
    data = make_data(9, seed=3)
    trainer = make_trainer(tmp_path, reference="model", estimator="snis", max_steps=4, tau=0.3)
    trainer.train()
    metrics = trainer.evaluate(data)
    a, b = [], []
    for example in data:
        batch = trainer.data_collator([example])
        ratio = trainer.model(**batch, log_ratio_only=True)["log_ratio"].double()
        terms = naive.satisfaction_terms(
            ratio, batch["pairs"], batch["preference"].double(), batch["pair_weight"].double(), "snis"
        )
        a.append(terms[0].sum(0))
        b.append(terms[1].sum(0))
    value, error, _ = naive.ratio_estimate(naive.ratio_moments(torch.stack(a), torch.stack(b)))
    for k, name in enumerate(trainer.objectives):
        assert metrics[f"eval_satisfaction/{name}"] == pytest.approx(float(value[k]), rel=1e-5)
        assert metrics[f"eval_standard_error/{name}"] == pytest.approx(float(error[k]), rel=1e-4)


def test_measured_values_are_those_of_the_oracle_with_capped_weights(tmp_path):
    for estimator in ("pair", "snis", "closed_form"):
        measured_by(tmp_path, estimator)


def measured_by(folder, estimator):
    trainer = make_trainer(
        folder,
        reference="model",
        estimator=estimator,
        dual_dataset=make_dual_data(6),
        max_steps=3,
        learning_rate=0.05,
        **STEERED,
    )
    before = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            before.append(trainer.dual.weight.double())

    trainer.add_callback(Watch())
    trainer.train()
    batch = trainer.data_collator(list(trainer.dual_dataset))
    r = trainer.model(**batch, log_ratio_only=True)["log_ratio"].double()
    preference, pairs = batch["preference"].double(), batch["pairs"]
    weight = torch.tensor([e.weight for e in trainer.dual_dataset for _ in e.pairs], dtype=DOUBLE)
    rho = naive.policy_ratio(preference, pairs, before[-1], 0.5, batch["prompt_index"])
    used = naive.capped_log_ratio(r) if estimator == "snis" else r
    expected, _ = naive.satisfaction(used, pairs, preference, weight, estimator, rho)
    found = [trainer.measurement.satisfaction[name] for name in trainer.objectives]
    assert found == pytest.approx(expected.tolist(), rel=1e-5), estimator
    if estimator == "snis":
        assert trainer.measurement.coverage == pytest.approx(float(r.exp().mean()), rel=1e-5)
        assert (used < r).any(), "the cap must act"
        assert float((used - torch.logsumexp(r, 0)).exp().max()) == pytest.approx(len(r) ** -0.5)


# -------------------------------------------------------------------------------------------------- whom they listen to


def test_figures_of_the_training_pairs_never_steer(tmp_path, monkeypatch):
    """A poisoned in-sample satisfaction shows in its own log and changes nothing else."""

    def run(folder):
        trainer = make_trainer(
            folder,
            dual_dataset=make_dual_data(),
            thresholds={"brief": 0.9},
            initial_multiplier="zero",
            max_steps=4,
            **STEERED,
        )
        trainer.train()
        return trainer

    clean = run(tmp_path / "clean")
    moments = forward.satisfaction_moments
    monkeypatch.setattr(forward, "satisfaction_moments", lambda *args: 0 * moments(*args) + 1)
    poisoned = run(tmp_path / "poisoned")
    assert poisoned.in_sample == {"helpful": 1.0, "brief": 1.0} != clean.in_sample
    assert poisoned.dual.state_dict() == clean.dual.state_dict()
    assert len({line["multiplier/brief"] for line in lines(clean)}) == 4, "the multipliers move"
    assert_same(weights(clean), weights(poisoned))


def test_labels_of_the_dual_data_never_reach_the_loss(tmp_path):
    """With multipliers that wait, runs whose dual labels are opposite end at the same weights."""
    ends = []
    for flipped in (False, True):
        data = make_dual_data()
        if flipped:
            pairs = [tuple(dataclasses.replace(pair, i=pair.j, j=pair.i) for pair in example.pairs) for example in data]
            data = PreferenceData.from_examples(
                [dataclasses.replace(e, pairs=p) for e, p in zip(data, pairs, strict=True)], data.objectives
            )
        trainer = make_trainer(tmp_path / f"{flipped}", dual_dataset=data, max_steps=4, **STILL)
        trainer.train()
        ends.append((weights(trainer), trainer.measurement.satisfaction["brief"]))
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == pytest.approx(1 - ends[1][1])
    assert ends[0][1] != pytest.approx(0.5, abs=1e-3)


def test_a_share_is_held_out_by_prompt_and_the_same_again(tmp_path):
    data = make_data(60)
    settings = {"dual_data": 0.25, "dual_effective_prompts": 5}
    trainer = make_trainer(tmp_path, data=data, **settings)
    fitted, held = ({prompt_key(e.prompt) for e in part} for part in (trainer.train_dataset, trainer.dual_dataset))
    prompts = {prompt_key(example.prompt) for example in data}
    assert fitted.isdisjoint(held)
    assert fitted | held == prompts
    assert len(held) == round(0.25 * len(prompts))
    again, other = (make_trainer(tmp_path, data=data, **settings, data_seed=seed) for seed in (42, 1))
    assert {prompt_key(e.prompt) for e in again.dual_dataset} == held, "42 is the default seed"
    assert {prompt_key(e.prompt) for e in other.dual_dataset} != held
    trainer.train()
    assert len(trainer.given_dataset) == 60
    for part in (trainer.train_dataset, trainer.dual_dataset):
        assert "ref_logprob" in part.dataset.column_names
    free = make_trainer(tmp_path, data=data, thresholds=None, **settings)
    assert (len(free.train_dataset), free.dual_dataset) == (60, None)


def test_too_few_prompts_are_not_held_out_and_the_multipliers_stand(tmp_path, caplog):
    trainer = make_trainer(tmp_path, thresholds={"brief": 0.5}, max_steps=12)
    told = "the multipliers stand where they start: 20% of 8 prompts is 2, and a dual step rests on at least 25"
    assert caplog.text.count(told) == 1
    trainer.train()
    assert len(trainer.train_dataset) == 8
    assert trainer.dual.multiplier == trainer.label_solution.multiplier
    assert trainer.measurement is None
    caplog.clear()
    fixed = make_trainer(tmp_path, data=make_data(60), thresholds={"brief": 0.5}, dual_data=0)
    assert len(fixed.train_dataset) == 60
    assert "the multipliers stand" not in caplog.text


def test_a_value_on_too_few_effective_prompts_moves_nothing_and_is_told_once(tmp_path, caplog):
    trainer = make_trainer(
        tmp_path, dual_dataset=make_dual_data(6), max_steps=4, **STEERED | {"dual_effective_prompts": 6.5}
    )
    trainer.train()
    assert {line["multiplier/brief"] for line in lines(trainer)} == {trainer.label_solution.multiplier["brief"]}
    assert trainer.dual.smoothed == {}
    assert caplog.text.count("the multiplier of brief was left as it is at step 1") == 1
    assert all(line["dual/effective_prompts/brief"] < 6.5 and line["dual/lr/brief"] == 0 for line in lines(trainer))


def test_weights_that_do_not_cover_the_policy_move_nothing(tmp_path):
    controller = Controller(make_config(tmp_path, **STEERED), ("helpful", "brief"), make_dual_data(), {"brief": 0.2})
    for coverage, moves in ((None, True), (1.1, True), (0.7, True), (0.6, False)):
        found = Measurement(5, 8, {"brief": 0.3}, {"brief": 0.02}, {"brief": 8.0}, coverage)
        dual = DualAscent(("helpful", "brief"), "helpful", {"brief": 0.4}, lr=1.0, maximum=10.0)
        logs, refused = controller.move(dual, found, 1.0, 0.1, waiting=False)
        assert dual.multiplier["brief"] == pytest.approx(0.1 * 0.1 if moves else 0.0)
        assert refused == ([] if moves else ["brief"])
        assert logs.get("dual/coverage") == coverage


def test_dual_data_of_ties_say_nothing_of_what_is_explained(tmp_path):
    """The regression's targets are 0: no loss of the reference to compare with, and no NaN in the log."""
    ties = [
        PreferenceExample(f"q {index}", ("a", "b"), (PreferencePair(0, 1, {"helpful": 0.5, "brief": 0.5}),))
        for index in range(4)
    ]
    data = PreferenceData.from_examples(ties, ("helpful", "brief"))
    controller = Controller(make_config(tmp_path, **STEERED), data.objectives, data, {"brief": 0.2})
    ratios = {index: [0.3, -0.2] for index in range(4)}
    assert controller.from_log_ratios(1, ratios, torch.ones(2)).r_squared is None


def test_parts_of_the_dual_data_take_turns(tmp_path):
    controller = Controller(
        make_config(tmp_path, dual_prompts=3), ("helpful", "brief"), make_dual_data(8), {"brief": 0.2}
    )
    parts = [controller.next_part() for _ in range(8)]
    assert all(len(set(part)) == 3 for part in parts)
    counts = np.bincount([index for part in parts for index in part])
    assert counts.tolist() == [3] * 8
    other = Controller(controller.args, controller.objectives, make_dual_data(8), {"brief": 0.2})
    other.load_state_dict(controller.state_dict())
    assert other.next_part() == controller.next_part()


def test_prompts_that_the_loss_fits_are_refused_as_dual_data(tmp_path):
    with pytest.raises(
        ValueError, match="dual_dataset: expected prompts that the loss never fits; 2 of 2 are in train"
    ):
        make_trainer(tmp_path, dual_dataset=make_data(2))


def test_without_evaluation_data_the_dual_data_choose_the_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path,
        dual_dataset=make_dual_data(6),
        estimator="pair",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        **STEERED,
    )
    trainer.train()
    found = {line["step"]: line for line in trainer.state.log_history if "eval_feasible_primary" in line}
    measured = {line["step"]: line for line in lines(trainer)}
    assert list(found) == [2, 4]
    for step, line in found.items():
        value = measured[step]["dual/satisfaction/brief"]
        assert line["eval_satisfaction/brief"] == pytest.approx(value, rel=1e-5)
    assert trainer.state.best_metric == max(line["eval_feasible_primary"] for line in found.values())


# ------------------------------------------------------------------------------------------------------- fresh answers


def test_fresh_answers_are_judged_against_the_stored_ones(tmp_path):
    """Win rates with ties for a half, from answers that are drawn again by the same seeds."""
    trainer = make_trainer(
        tmp_path,
        estimator="snis",
        dual_dataset=make_dual_data(7),
        judges={"brief": brevity},
        dual_samples=5,
        dual_max_new_tokens=4,
        per_device_eval_batch_size=7,
        max_steps=2,
        **STEERED,
    )
    trainer.train()
    order = [example.prompt for example in trainer.dual_dataset]
    part = [trainer._controller._order[(5 + offset) % 7] for offset in range(5)]
    answers = sample_responses(
        trainer.model,
        make_tokenizer(),
        [order[index] for index in part],
        samples_per_prompt=1,
        max_new_tokens=4,
        batch_size=5,
        seed=int(np.random.SeedSequence([42, 2, 0]).generate_state(1)[0]),
        progress=False,
    )
    assert trainer.dual_dataset is not None
    values, mass = [], []
    for index, (answer,) in zip(part, answers, strict=True):
        example = trainer.dual_dataset[index]
        length, others = len(answer.split()), [len(text.split()) for text in example.responses]
        values.append(np.mean([(length < other) + 0.5 * (length == other) for other in others]))
        mass.append(example.weight)
    assert set(trainer.measurement.satisfaction) == {"brief"}
    assert trainer.measurement.satisfaction["brief"] == pytest.approx(np.average(values, weights=mass))
    assert trainer.measurement.effective_prompts["brief"] == pytest.approx(sum(mass) ** 2 / np.square(mass).sum())
    assert (trainer.measurement.prompts, trainer.measurement.coverage) == (5, None)


class Modes(TrainerCallback):
    """Which modules train after each step; some are switched off before the dual step."""

    def __init__(self):
        self.modes = []

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        next(module for module in model.modules() if isinstance(module, torch.nn.Linear)).training = False

    def on_step_end(self, args, state, control, model, **kwargs):
        self.modes.append([module.training for module in model.modules()])


def drawing(prompt, response):
    """A judge who uses the random state."""
    torch.rand(1)
    return brevity(prompt, response)


@pytest.mark.parametrize("judges", [None, {"brief": drawing}], ids=["labels", "judges"])
def test_measuring_leaves_no_trace_in_random_states_and_modes(judges, tmp_path):
    """With dropout and multipliers that wait, weights are those of a run that never measures, as are draws after."""
    ends = []
    for name, steps in (("often", 1), ("never", 100)):
        trainer = make_trainer(
            tmp_path / name,
            lora(make_model(), lora_dropout=0.3),
            disable_dropout=False,
            estimator="snis",
            dual_dataset=make_dual_data(5),
            judges=judges,
            max_steps=4,
            **STILL | {"dual_steps": steps},
        )
        watch = Modes()
        trainer.add_callback(watch)
        trainer.train()
        assert bool(lines(trainer)) is (name == "often")
        ends.append((weights(trainer), torch.rand(3), watch.modes))
    assert_same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]
    assert not all(ends[0][2][0]), "the callback has switched some off"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judges": {"kind": brevity}}, "judges: expected objectives among helpful, brief; got kind"),
        (
            {"judges": {"helpful": brevity}},
            "judges: expected one for every objective with a threshold; got none for brief",
        ),
        ({"judges": {"brief": brevity}, "estimator": "pair"}, "estimator: expected snis or closed_form with judges"),
    ],
)
def test_judges_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, dual_dataset=make_dual_data(), **{"estimator": "snis", **changes})


def test_responses_that_judges_would_not_be_shown_whole_are_refused(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    asks = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [*make_dual_data(), dataclasses.replace(make_dual_data()[0], responses=("w1", asks, "w2"), id="late")]
    with pytest.raises(ValueError, match=r"responses\[1\]: example late: expected text, as judges .*; got tool"):
        make_trainer(tmp_path, dual_dataset=rows, judges={"brief": brevity}, estimator="snis")


# ------------------------------------------------------------------------------------------------------------- the step


def test_the_gain_leaves_as_much_noise_as_is_allowed():
    """x <- x - gain (x + e) with independent errors: 200,000 steps know the spread to 1%."""
    generator = np.random.default_rng(0)
    for error in (0.02, 0.05):
        share, x, seen = gain(error, 0.01, 1.0), 0.0, []
        for e in generator.normal(0, error, 200_000):
            x -= share * (x + e)
            seen.append(x)
        assert np.std(seen) == pytest.approx(0.01, rel=0.03)
    assert gain(0.005, 0.01, 1.0) == gain(0.0, 0.01, 1 / 8) == 0.5
    assert gain(0.005, 0.01, 1 / 80) == pytest.approx(0.05), "half a step in an eighth of the run"
    assert gain(math.nan, 0.01, 1.0) == 0.0


@pytest.mark.parametrize("estimator", ["pair", "snis"])
def test_the_slope_is_how_the_labels_optimum_answers_its_multiplier(estimator):
    """Against the satisfaction at a multiplier that is held a little higher: a threshold of that value asks for it."""
    data = make_data(30)
    rates = win_rates(data)
    examples = list(data)
    pairs = [(x, pair) for x, example in enumerate(examples) for pair in example.pairs]
    labels = [
        [math.nan if (z := pair.preference[name]) is None else z for name in data.objectives] for _, pair in pairs
    ]

    def solve(bound):
        return solve_labels(
            rates.win_rate,
            rates.reference,
            data.objectives,
            "helpful",
            {"brief": bound},
            0.3,
            estimator=estimator,
            prompt_weight=rates.prompt_weight,
            prompt=[x for x, _ in pairs],
            i=[pair.i for _, pair in pairs],
            j=[pair.j for _, pair in pairs],
            preference=labels,
        )

    middle = solve(0.5)
    low, high = (solve(0.5 + sign * 1e-4).multiplier["brief"] for sign in (-1, 1))
    assert middle.multiplier["brief"] > 0
    assert middle.slope["brief"] == pytest.approx(2e-4 / (high - low), rel=1e-3)


def test_the_automatic_step_follows_from_slope_noise_and_learning_rate(tmp_path):
    trainer = make_trainer(
        tmp_path,
        estimator="snis",
        dual_dataset=make_dual_data(8),
        thresholds={"brief": 0.45},
        max_steps=8,
        learning_rate=1e-3,
        **STEERED | {"dual_lr": "auto", "dual_warmup_steps": 2, "dual_coverage": 0},
    )
    trainer.train()
    slope, multiplier = trainer.label_solution.slope["brief"], trainer.label_solution.multiplier["brief"]
    assert slope > 0.01 / (4 * 0.5)
    for line in lines(trainer):
        step, share = line["step"], 1 - line["step"] / 8
        expected = share * gain(line["dual/standard_error/brief"], 0.01, 1 / 8) / slope if step > 2 else 0.0
        assert line["dual/lr/brief"] == pytest.approx(expected, rel=1e-9)
        multiplier = max(0.0, multiplier + expected * (0.45 - line["dual/satisfaction/brief"]))
        assert line["multiplier/brief"] == pytest.approx(multiplier, rel=1e-9)
    assert len({line["multiplier/brief"] for line in lines(trainer)}) > 3


def test_by_default_the_multipliers_wait_for_half_of_the_first_epoch(tmp_path):
    settings = STEERED | {"dual_warmup_steps": None, "initial_multiplier": "zero", "thresholds": {"brief": 0.9}}
    trainer = make_trainer(tmp_path, dual_dataset=make_dual_data(), max_steps=5, on_infeasible="warn", **settings)
    trainer.train()
    assert [line["multiplier/brief"] > 0 for line in lines(trainer)] == [False, False, True, True, True], "4 an epoch"
    assert trainer._dual_steps() == 1
    assert make_trainer(tmp_path, dual_dataset=make_dual_data())._dual_steps() == 8


def test_with_confidence_the_aim_is_above_the_threshold_by_the_error_of_all_dual_data(tmp_path):
    trainer = make_trainer(
        tmp_path,
        dual_dataset=make_dual_data(8),
        dual_prompts=4,
        threshold_confidence=0.95,
        initial_multiplier="zero",
        max_steps=4,
        **STEERED,
    )
    trainer.train()
    multiplier = 0.0
    for line in lines(trainer):
        margin = 1.6448536 * line["dual/standard_error/brief"] * math.sqrt(4 / 8)
        assert line["dual/aim/brief"] == pytest.approx(0.4 + margin, rel=1e-6)
        assert line["threshold/brief"] == 0.4
        multiplier = max(0.0, multiplier + 0.1 * (0.4 + margin - line["dual/satisfaction/brief"]))
        assert line["multiplier/brief"] == pytest.approx(multiplier, abs=1e-9)
    assert multiplier > 0
    assert "dual/aim/brief" not in make_trainer(tmp_path).state.log_history


# --------------------------------------------------------------------------------------------------------- end to end

SCORES = torch.randn(2, len(WORDS), generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
SCORES[1] = -0.3 * SCORES[0] + 0.95 * SCORES[1]
JUDGES = {
    name: lambda prompt, response, score=score: sum(
        float(score[int(word[1:])]) for word in response.split() if word != "w"
    )
    for name, score in zip(("helpful", "brief"), SCORES, strict=True)
}


def writer(seed):
    """A model that writes random words."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    )
    model.generation_config.eos_token_id = 1
    # Words only: no end and no padding, so that a response is five words, whoever writes it.
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=1e-2), torch.Generator().manual_seed(seed)
    for _ in range(60):
        ids = torch.randint(3, 63, (64, 8), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def written(model, prompts, seed):
    """Prompts with 4 responses of the model's own, every pair judged."""
    rng = random.Random(seed)
    asked = [f"{seed} " + " ".join(rng.choice(WORDS) for _ in range(3)) for _ in range(prompts)]
    drawn = sample_responses(
        model,
        make_tokenizer(),
        asked,
        samples_per_prompt=4,
        max_new_tokens=5,
        batch_size=256,
        seed=seed,
        progress=False,
    )
    examples = []
    for prompt, responses in zip(asked, drawn, strict=True):
        texts = tuple(text or "w0" for text in responses)  # one in some hundreds is empty
        score = {name: [judge(prompt, text) for text in texts] for name, judge in JUDGES.items()}
        pairs = [
            PreferencePair(i, j, {name: 0.5 + 0.5 * float(np.sign(s[i] - s[j])) for name, s in score.items()})
            for i in range(4)
            for j in range(i)
        ]
        examples.append(PreferenceExample(prompt, texts, tuple(pairs)))
    return PreferenceData.from_examples(examples, list(JUDGES))


def held_out_rate(model, data):
    """Win rate of ``brief`` over the stored responses, by fresh answers."""
    prompts = [example.prompt for example in data]
    drawn = sample_responses(
        model,
        make_tokenizer(),
        prompts,
        samples_per_prompt=4,
        max_new_tokens=5,
        batch_size=256,
        seed=1,
        progress=False,
    )
    judge = JUDGES["brief"]
    return win_rate(
        [[judge(e.prompt, text) for text in texts] for e, texts in zip(data, drawn, strict=True)],
        [[judge(e.prompt, text) for text in e.responses] for e in data],
    ).mean


def memorise(folder, seed, in_sample):
    """12 epochs over 64 prompts; steered by 128 others, or, as in_sample, by the training pairs step by step."""
    model = writer(seed)
    data, dual, unseen = (written(model, n, 1000 * part + seed) for part, n in ((1, 64), (2, 128), (3, 600)))
    settings = {"dual_lr": 0.6, "dual_steps": 1, "dual_prompts": 8, "dual_effective_prompts": 1, "dual_coverage": 0}
    trainer = make_trainer(
        folder,
        model,
        data,
        # Without an end, which was not written, the log-probability is that of what was.
        data_collator=PreferenceCollator(make_tokenizer(), data.objectives, max_response_length=5, truncate=True),
        dual_dataset=dual,
        tau=0.2,
        thresholds={"brief": 0.5},
        estimator="snis",
        max_steps=96,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=100,
        seed=seed,
        **settings if in_sample else {},
    )
    if in_sample:
        # What the trainer refuses to be given.
        trainer._prepare_references()
        trainer.dual_dataset = trainer.train_dataset
        trainer._controller = Controller(trainer.args, trainer.objectives, trainer.train_dataset, {"brief": 1.0})
    trainer.train()
    multiplier = [line["multiplier/brief"] for line in lines(trainer) if line["step"] > 48]
    return multiplier, held_out_rate(trainer.model, unseen)


# Of seeds 0 to 7 three where the threshold binds: at 0, 1, 3 and 7 neither multiplier leaves the neighbourhood of 0. In
# all eight the held-out range is at most 0.022 and the rate 0.503 to 0.535.
@pytest.mark.parametrize("seed", [2, 4, 5])
def test_multipliers_settle_where_in_sample_ones_run_about(seed, tmp_path):
    """Over the second half of a run that memorises its pairs, a multiplier moves by 0.010 to 0.022, against 0.20 to
    0.45; and on prompts that neither loss nor multipliers have seen, fresh answers win 0.503 to 0.514, where 0.5 is
    asked for."""
    settled, rate = memorise(tmp_path / "held out", seed, in_sample=False)
    assert max(settled) - min(settled) < 0.04
    assert rate == pytest.approx(0.5, abs=0.05)
    running, _ = memorise(tmp_path / "in-sample", seed, in_sample=True)
    assert max(running) - min(running) > 0.1
