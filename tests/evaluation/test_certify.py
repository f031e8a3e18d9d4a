"""Certificates: the bound's coverage where the truth is known, the choice that spoils nothing, and `mopo certify`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from certify_samples import CASES, NAMES, judged, weighted
from scipy import stats
from trainer_samples import lora, make_data, make_model, make_tokenizer

from mopo_kernels import certify as certificates
from mopo_kernels import cli, evaluation, naive
from mopo_kernels.certify import Certificate, PromptSums, certificate, certify, choose, halves, lower_bound
from mopo_kernels.data import PreferenceCollator, PreferenceData
from mopo_kernels.data.dataset import prompt_key

CONFIDENCE, RUNS = 0.95, 400
# Of 400 certificates that are all wrong to give, 5% and two standard errors.
ALLOWED = 0.05 + 2 * math.sqrt(0.05 * 0.95 / RUNS)


def wrong(case: str, below: float = 1e-9, **options: float) -> float:
    """The share of certificates for thresholds just above what there is in which some bound is above the truth."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(RUNS):
        sums, truth = CASES[case](rng)
        thresholds = {name: value + below for name, value in zip(NAMES, truth, strict=True)}
        bounds = certificate(sums, thresholds, effective_prompts=2.0, coverage=0.0, **options).bounds
        found += any(bound.kept for bound in bounds)
    return found / RUNS


@pytest.mark.parametrize("case", CASES)
def test_bounds_are_wrong_as_seldom_as_they_say(case):
    assert wrong(case) <= ALLOWED


@pytest.mark.parametrize("case", CASES)
def test_without_a_quantile_most_would_be_wrong(case, monkeypatch):
    """The negative control: estimates in place of bounds."""
    monkeypatch.setattr(certificates, "lower_bound", lambda value, total, level: float(value.sum() / total.sum()))
    assert wrong(case) > 0.4


def test_the_bound_of_plain_errors_is_wrong_where_nearly_all_is_won(monkeypatch):
    """Why a lost prompt is added: without it nothing shows what has not happened yet."""

    def plain(value, total, level):
        mean, error, effective = certificates._estimate(value, total)
        return mean - stats.t.ppf(level, effective - 1) * error

    monkeypatch.setattr(certificates, "lower_bound", plain)
    assert wrong("judged, 30 prompts, 0.95") > 0.2


def test_certificates_of_policies_at_the_thresholds_are_false_at_most_as_often_as_allowed():
    """All held at once: the whole of `certify`, with its choice among five equal candidates on the other half."""
    rng = np.random.default_rng(1)
    false = naive = 0
    for _ in range(RUNS):
        pools = [judged(rng, 120, 0.5, 2.0)[0] for _ in range(5)]

        def measure(candidate, prompts, part, pools=pools):
            pool, rows = pools[candidate], list(prompts)
            return PromptSums(NAMES, pool.value[rows], pool.total[rows], pool.responses[rows])

        thresholds = {"first": 0.5 + 1e-9}
        decision = certify(measure, 5, [str(x) for x in range(120)], thresholds, "second")
        false += decision.certificate.certified
        naive += max(certificate(pool, thresholds).bounds[0].lower for pool in pools) >= 0.5
    assert false / RUNS <= ALLOWED
    assert naive / RUNS > 2 * ALLOWED  # choosing and certifying on the same prompts


def test_the_bound_is_the_estimate_with_a_lost_prompt_less_students_quantile():
    rng = np.random.default_rng(0)
    total = rng.uniform(0.5, 2.0, 40)
    value = total * rng.uniform(size=40)
    a, b = np.append(value, 0.0), np.append(total, (total**2).sum() / total.sum())
    v, n = a.sum() / b.sum(), 41
    s = math.sqrt(n / (n - 1) * ((a - v * b) ** 2).sum()) / b.sum()
    freedom = b.sum() ** 2 / (b**2).sum() - 1
    assert lower_bound(value, total, 0.975) == pytest.approx(v - stats.t.ppf(0.975, freedom) * s, rel=1e-12)
    assert lower_bound(value, total, 0.99) < lower_bound(value, total, 0.975)
    assert lower_bound(value[:1], total[:1], 0.95) == -math.inf


def test_a_certificate_counts_labelled_prompts_and_shares_the_risk_among_its_thresholds():
    sums, _ = judged(np.random.default_rng(0), 60, 0.8, 2.0)
    one = certificate(sums, {"first": 0.5})
    two = certificate(sums, {"first": 0.5, "second": 0.5})
    assert one.bounds[0].lower == lower_bound(sums.value[:, 0], sums.total[:, 0], 0.95)
    assert two.bounds[0].lower == lower_bound(sums.value[:, 0], sums.total[:, 0], 0.975)
    assert one.certified
    assert two.certified
    assert not certificate(sums, {"first": one.bounds[0].lower + 1e-6}).certified
    half = sums.total.copy()
    half[:30, 0] = 0.0
    partly = PromptSums(NAMES, sums.value * (half > 0), half, sums.responses)
    found = certificate(partly, {"first": 0.1}, effective_prompts=30.0).bounds[0]
    assert found.effective_prompts == 30.0
    assert found.lower == lower_bound(sums.value[30:, 0], sums.total[30:, 0], 0.95)


def test_too_few_effective_prompts_or_weights_that_do_not_cover_certify_nothing():
    rng = np.random.default_rng(0)
    few = certificate(judged(rng, 29, 0.9, 5.0)[0], {"first": 0.1})
    assert few.bounds[0].kept
    assert not few.certified
    assert few.refused == ("first rests on an effective number of 29.0 prompts, at least 30 are needed",)
    sums, _ = weighted(rng, 100, 0.3)
    assert certificate(sums, {"first": 0.1}).certified
    assert sums.importance is not None
    assert sums.coverage is not None
    left = PromptSums(NAMES, sums.value, sums.total, sums.responses, sums.importance * 0.5 / sums.coverage)
    assert not certificate(left, {"first": 0.1}).certified
    assert "the mean importance weight is 0.50, at least 0.7" in certificate(left, {"first": 0.1}).refused[0]
    unlabelled = certificate(PromptSums(NAMES, 0 * sums.value, 0 * sums.total, sums.responses), {"first": 0.1})
    assert not unlabelled.certified
    assert json.loads(json.dumps(unlabelled.as_dict(), allow_nan=False))["bounds"][0]["lower"] is None


@pytest.mark.parametrize(
    ("thresholds", "confidence", "message"),
    [
        ({}, 0.95, "thresholds: expected at least one objective"),
        ({"third": 0.5}, 0.95, "thresholds: expected objectives among first, second; got 'third'"),
        ({"first": 0.5}, 0.5, r"confidence: expected a number in \(0\.5, 1\); got 0\.5"),
    ],
)
def test_what_makes_no_certificate_is_named(thresholds, confidence, message):
    sums, _ = judged(np.random.default_rng(0), 60, 0.8, 2.0)
    with pytest.raises(ValueError, match=message):
        certificate(sums, thresholds, confidence=confidence)


def test_the_choice_takes_the_best_primary_of_those_that_keep_thresholds_with_room():
    def candidate(value: float, error: float = 0.02) -> Certificate:
        rng = np.random.default_rng(0)
        raw = rng.standard_normal(50)
        spread = (raw - raw.mean()) / raw.std(ddof=1) * error * math.sqrt(50)
        one = np.stack([value + spread] * 2, axis=1)
        return certificate(PromptSums(NAMES, one, np.ones_like(one), np.ones(50)), {"first": 0.5})

    far, near, miss = candidate(0.65), candidate(0.55), candidate(0.45)
    assert near.certified  # on these prompts, but others would often say otherwise
    assert choose([near, far, miss], [0.9, 0.6, 0.99]) == 1
    assert choose([candidate(0.66), far, miss], [0.7, 0.6, 0.99]) == 0
    assert choose([miss, near, candidate(0.47)], [0.9, 0.1, 0.95]) == 1


def test_halves_are_disjoint_by_prompt_whatever_the_order():
    prompts = [f"prompt {index}" for index in range(41)]
    first, second = halves(prompts, 3)
    assert sorted(first + second) == list(range(41))
    assert (len(first), len(second)) == (20, 21)
    again = halves(prompts[::-1], 3)
    assert {prompts[index] for index in first} == {prompts[::-1][index] for index in again[0]}
    assert halves(prompts, 4)[0] != first


# Measurements


def test_values_of_pairs_are_the_estimators_and_add_up_by_prompt():
    data = make_data(12)
    twice = PreferenceData.from_examples([*data, *make_data(3)], data.objectives)  # three prompts once more
    keys = [prompt_key(example.prompt) for example in twice]
    numbers = [list(dict.fromkeys(keys)).index(key) for key in keys]
    generator = torch.Generator().manual_seed(0)
    ratio = [torch.randn(len(example.responses), generator=generator).tolist() for example in twice]
    for estimator in ("snis", "pair"):
        sums = certificates.pair_sums(list(twice), numbers, ratio, twice.objectives, estimator)
        batch = PreferenceCollator(make_tokenizer(), twice.objectives)(list(twice))
        expected, _ = naive.satisfaction(
            torch.tensor([value for row in ratio for value in row], dtype=torch.float64),
            batch["pairs"],
            batch["preference"].double(),
            batch["pair_weight"].double(),
            estimator,
        )
        assert sums.value.shape == (12, 2)
        np.testing.assert_allclose(sums.value.sum(0) / sums.total.sum(0), expected.numpy(), rtol=1e-6)
    assert sums.coverage is None
    flat = [[0.0] * len(row) for row in ratio]
    assert certificates.pair_sums(list(twice), numbers, flat, twice.objectives, "snis").coverage == 1.0
    with pytest.raises(ValueError, match="estimator: expected one of snis, pair; got 'closed_form'"):
        certificates.pair_sums(list(twice), numbers, ratio, twice.objectives, "closed_form")


def test_log_probabilities_of_a_scaled_policy_are_those_of_its_logits(workspace):
    data = make_data(5)
    base = evaluation.load_policy(workspace / "model", device="cpu")
    policy = evaluation.load_policy(workspace / "model", workspace / "adapter", share=base, scale=0.5)
    collator = PreferenceCollator(policy.tokenizer, data.objectives)
    found = certificates.sequence_logprobs(policy, collator, list(data), 2)
    batch = collator(list(data))
    with policy.active() as model, torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    token = torch.log_softmax(logits.double(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = (token * (labels != -100)).sum(1)
    flat = torch.tensor([value for row in found for value in row], dtype=torch.float64)
    torch.testing.assert_close(flat, expected, rtol=1e-5, atol=1e-4)
    assert [len(row) for row in found] == [len(example.responses) for example in data]
    plain = certificates.sequence_logprobs(policy.base(), collator, list(data), 2)
    assert abs(plain[0][0] - found[0][0]) > 1e-2


# mopo certify


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, an adapter on it, held-out pairs, prompts and judges."""
    folder = tmp_path_factory.mktemp("certify")
    model = make_model()
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    model.name_or_path = model.config._name_or_path = str(folder / "model")
    tuned = lora(model)
    for name, size in (("adapter", 0.3), ("far", 80.0)):
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_B" in key:
                    parameter.mul_(size)
        tuned.save_pretrained(folder / name)
    make_data(90, seed=5).save(folder / "held.jsonl")
    prompts = [json.dumps({"prompt": f"w{index} w{index % 7}"}) for index in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (folder / "judges.py").write_text(
        "JUDGES = {'long': lambda p, r: len(r.split()), 'same': lambda p, r: 0.0}\n", encoding="utf-8"
    )
    return folder


def run(workspace: Path, *more: str, policy: str = "adapter") -> int:
    return cli.main(["certify", str(workspace / policy), "--device", "cpu", *more])


def by_pairs(workspace: Path, *more: str, **options: str) -> int:
    return run(workspace, "--data", str(workspace / "held.jsonl"), *more, **options)


def test_pairs_certify_low_thresholds_and_not_high_ones_by_exit_code_and_record(workspace, tmp_path, capsys):
    out = tmp_path / "new" / "record.json"
    assert by_pairs(workspace, "--thresholds", "brief=0.2,helpful=0.2", "--output", str(out)) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["certified"] is True
    assert record["prompts"] == len({prompt_key(p) for p in make_data(90, seed=5).dataset["prompt"]})
    assert [bound["objective"] for bound in record["bounds"]] == ["brief", "helpful"]
    assert all(0.2 <= bound["lower"] < bound["value"] for bound in record["bounds"])
    assert f"{record['bounds'][0]['lower']:.3f}" in printed
    assert "Certified. All lower bounds hold with probability 0.95." in printed
    assert len(record["weights"]) == 64
    high = record["bounds"][0]["value"]
    assert by_pairs(workspace, "--thresholds", f"brief={high}", "--output", str(out)) == 1
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["certified"] is False
    assert "Not certified." in capsys.readouterr().out


def test_the_base_model_itself_has_parity_exactly(workspace, tmp_path):
    """A scale of 0: every weight is 1, and the value is that of the labels, in either estimator."""
    values = {}
    for estimator in ("snis", "pair"):
        out = tmp_path / f"{estimator}.json"
        more = ["--thresholds", "brief=0.3", "--estimator", estimator, "--output", str(out)]
        assert by_pairs(workspace, *more, policy="adapter=0") == 0
        record = json.loads(out.read_text(encoding="utf-8"))
        values[estimator] = record["bounds"][0]["value"]
        assert record["coverage"] == (pytest.approx(1.0, abs=1e-6) if estimator == "snis" else None)
    assert values == {"snis": pytest.approx(0.5, abs=1e-6), "pair": pytest.approx(0.5, abs=1e-6)}


def test_a_policy_far_from_the_pairs_is_refused_with_a_reason(workspace, capsys):
    assert by_pairs(workspace, "--thresholds", "brief=0.01", policy="far") == 1
    assert "nothing is certified: " in capsys.readouterr().out


def test_several_candidates_are_chosen_among_on_other_prompts(workspace, tmp_path):
    out = tmp_path / "record.json"
    more = [str(workspace / "adapter=0"), str(workspace / "adapter=0.5"), "--output", str(out)]
    assert by_pairs(workspace, *more, "--thresholds", "brief=0.2") in (0, 1)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [each["scale"] for each in record["candidates"]] == [1.0, 0.0, 0.5]
    everything = len({prompt_key(p) for p in make_data(90, seed=5).dataset["prompt"]})
    assert record["prompts"] + record["candidates"][0]["prompts"] == everything
    assert record["scale"] in (0.0, 0.5, 1.0)


def test_judges_certify_by_fresh_answers_and_equal_scores_are_parity(workspace, tmp_path):
    out = tmp_path / "record.json"
    more = ["--prompts", str(workspace / "prompts.jsonl"), "--judges", f"{workspace / 'judges.py'}:JUDGES"]
    more += ["--samples", "2", "--max_new_tokens", "4", "--output", str(out)]
    assert run(workspace, *more, "--thresholds", "same=0.4") == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["bounds"][0]["value"] == 0.5
    assert record["bounds"][0]["lower"] == pytest.approx(lower_bound(np.full(40, 0.5), np.ones(40), 0.95))
    assert record["prompts"] == 40
    assert record["settings"]["judges"].endswith("judges.py:JUDGES")
    assert run(workspace, *more, "--thresholds", "same=0.4,long=0.99") == 1


def test_the_record_goes_into_the_model_card_once(workspace, tmp_path):
    shutil.copytree(workspace / "adapter", tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    card.write_text("---\ntags:\n- mopo\n---\n\n# Mine\n\nText.\n", encoding="utf-8")
    for threshold, said in (("0.2", "Certified: with probability 0.95"), ("0.9", "Not certified: ")):
        more = ["--data", str(workspace / "held.jsonl"), "--thresholds", f"brief={threshold}", "--card"]
        assert run(tmp_path, *more) == (0 if threshold == "0.2" else 1)
        text = card.read_text(encoding="utf-8")
        assert text.startswith("---\ntags:\n- mopo\n---\n\n# Mine\n\nText.\n\n## Certificate\n")
        assert text.count("## Certificate") == 1
        assert said in text
        assert f"| brief | {threshold} | " in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--thresholds", "brief=0.2"], "--data, --prompts: expected one of them"),
        (["--data", "{held}", "--thresholds", "kind=0.2"], "an objective of helpful, brief and a value in [0, 1]; got"),
        (["--data", "{held}", "--thresholds", "brief=2"], "got brief=2"),
        (["--data", "{held}", "--thresholds", ""], "--thresholds: expected at least one"),
        (
            ["--data", "{held}", "--thresholds", "brief=0.2", "--estimator", "closed_form"],
            "--estimator: expected one of",
        ),
        (
            ["--data", "{held}", "--thresholds", "brief=0.2", "--confidence", "0.4"],
            "--confidence: expected a number in (0.5, 1)",
        ),
        (["--data", "{held}", "--thresholds", "brief=0.2", "--judges", "x.py:J"], "--judges: expected with --prom"),
        (["--data", "{held}", "--thresholds", "brief=0.2", "--primary", "kind"], "--primary: expected one of helpful"),
        (
            ["--data", "{held}", "--thresholds", "brief=0.2", "--split", "test"],
            "no split 'test', there is: one without",
        ),
        (
            ["--data", "{held}", "--thresholds", "brief=0.2", "--columns", "prompt=q"],
            ":1: q: expected a string; got None",
        ),
        (
            ["--prompts", "x.txt", "--judges", "x.py:J", "--thresholds", "brief=0.2", "--split", "test"],
            "--split: expected it with --data only; got 'test'",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(workspace, capsys, more, message):
    assert run(workspace, *[part.format(held=workspace / "held.jsonl") for part in more]) == 2
    assert message in capsys.readouterr().err


def test_a_whole_model_needs_a_baseline_and_a_bad_scale_is_named(workspace, capsys):
    assert by_pairs(workspace, "--thresholds", "brief=0.2", policy="model") == 2
    assert "--baseline: expected a model" in capsys.readouterr().err
    assert by_pairs(workspace, "--thresholds", "brief=0.2", policy="adapter=half") == 2
    assert "got " in capsys.readouterr().err
