"""The demo: its verdict must fail when a claim does not hold, and a run must go on, or start over, as it says.

On a tiny random model and a few words; `make demo` runs the rest.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import NormalDist
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_samples import WORDS, make_model, make_tokenizer

from mopo_kernels.evaluation import Comparison, WinRate, compare_responses

DEMO = Path(__file__).parents[2] / "examples" / "demo"
POLICIES = ("constrained", "unconstrained", "turned_down")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.setattr(sys, "path", [str(DEMO), *sys.path])
    return importlib.import_module


@pytest.fixture
def run(demo: Callable[[str], ModuleType]) -> ModuleType:
    return demo("run")


@pytest.fixture
def protocol(demo: Callable[[str], ModuleType]) -> Any:
    """The demo's own, but for thresholds that the win rates below were made for."""
    shipped = demo("protocol").load_protocol()
    return replace(shipped, primary="warmth", thresholds={"plain": 0.44, "brevity": 0.39}, confidence=0.95)


# Win rates under which every claim holds.
RATES = {
    "constrained": {"warmth": 0.58, "plain": 0.52, "brevity": 0.48},
    "unconstrained": {"warmth": 0.65, "plain": 0.43, "brevity": 0.30},
    "turned_down": {"warmth": 0.52, "plain": 0.48, "brevity": 0.44},
}


def comparisons(prompts: int = 150, **changes: float) -> dict[str, Comparison]:
    """Comparisons with the win rates of RATES, but for the changes: policy__objective=rate.

    A response is its scores in words. Of four samples a prompt the number that wins against the base model's one answer
    is spread evenly over prompts, over others for each policy.
    """
    found = {}
    names = list(RATES["constrained"])
    judges = {name: lambda prompt, text, k=k: float(text.split()[k]) for k, name in enumerate(names)}
    for number, (policy, rates) in enumerate(RATES.items()):
        rates = {name: changes.get(f"{policy}__{name}", rate) for name, rate in rates.items()}
        drawn = []
        for prompt in range(prompts):
            wins = {name: int(4 * rate + (prompt * 0.618034 + 0.37 * number) % 1) for name, rate in rates.items()}
            drawn.append([" ".join("1" if n < wins[name] else "-1" for name in names) for n in range(4)])
        texts = [str(prompt) for prompt in range(prompts)]
        found[policy] = compare_responses(texts, drawn, [["0 0 0"]] * prompts, judges, progress=False)
    return found


def test_every_claim_holds_where_it_does(run: ModuleType, protocol: Any) -> None:
    claims = run.verify(protocol, comparisons(), 0.3)
    assert all(claims.values())
    assert [claim.split(":")[0] for claim in claims] == ["kept", "kept", "gained", "needed", "worth"]
    assert {claim.split(":")[0] for claim in claims} == set(protocol.claims)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"constrained__warmth": 0.501, "turned_down__warmth": 0.42}, "gained"),
        ({"constrained__plain": 0.45}, "kept: plain"),
        ({"constrained__brevity": 0.38}, "kept: brevity"),
        ({"unconstrained__brevity": 0.42}, "needed"),
        ({"unconstrained__brevity": 0.38}, "needed"),
        ({"turned_down__warmth": 0.57}, "worth"),
    ],
    ids=[
        "primary not surely above parity",
        "plain above its threshold, but not surely",
        "brevity missed",
        "nothing falls without thresholds",
        "one falls, but not surely",
        "the rival is as good",
    ],
)
def test_a_claim_that_does_not_hold_fails(
    run: ModuleType, protocol: Any, changes: dict[str, float], claim: str
) -> None:
    claims = run.verify(protocol, comparisons(**changes), 0.3)
    assert [text for text, holds in claims.items() if not holds] == [text for text in claims if text.startswith(claim)]


def test_bounds_are_one_sided(run: ModuleType, protocol: Any) -> None:
    comparison = comparisons()["constrained"]
    low, high = run.bounds(protocol, comparison, "plain")
    rate = comparison.win_rates["plain"]
    assert rate.low < low < rate.mean < high < rate.high


@pytest.mark.parametrize("largest", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_the_rival_is_the_largest_scale_that_keeps_every_threshold(
    run: ModuleType, protocol: Any, largest: float
) -> None:
    def win_rates(scale: float) -> Mapping[str, WinRate]:
        rates = {"plain": 0.6, "brevity": 0.39 + (largest - scale) / 10 + 1e-9, "warmth": 0.5 + scale / 10}
        return {name: WinRate(name, rate, 0.0, 1.0, 150, 600) for name, rate in rates.items()}

    scale, looked_at = run.rival_scale(replace(protocol, scales=[k / 10 for k in range(1, 11)]), win_rates)
    assert scale == largest
    assert len(looked_at) <= 4
    assert all((rates["brevity"] >= 0.39) == (at <= largest) for at, rates in looked_at.items())


def test_an_interruption_gives_one_command_to_go_on_with(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--resume", "--output", "my runs"])
    assert run.again(sys.argv[1:]) == f"{sys.executable} run.py --resume --output 'my runs'"
    source = Path(run.__file__).read_text()
    assert source.count("go on with: ") == 1
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


def test_the_protocol_is_of_the_prompts_and_data_beside_it(demo: Callable[[str], ModuleType]) -> None:
    module = demo("protocol")
    protocol = module.load_protocol()
    module.check_digests(protocol)
    assert set(protocol.digests) == {
        "train prompts",
        "validation prompts",
        "test prompts",
        "preferences.jsonl",
        "base.jsonl",
    }
    changed = replace(protocol, digests=protocol.digests | {"test prompts": "0" * 64})
    assert changed.fingerprint() != protocol.fingerprint()
    with pytest.raises(ValueError, match="the digest of test prompts differs from what it records"):
        module.check_digests(changed)


def test_the_protocol_trains_for_more_than_it_claims_on_objectives_that_have_judges(
    demo: Callable[[str], ModuleType],
) -> None:
    protocol, judges = demo("protocol").load_protocol(), demo("judges").JUDGES
    assert {protocol.primary, *protocol.thresholds} <= set(judges)
    assert set(protocol.aims) == set(protocol.thresholds)
    assert all(protocol.aims[name] >= bound for name, bound in protocol.thresholds.items())
    assert protocol.scales == sorted(protocol.scales)
    assert protocol.scales[-1] == 1.0
    assert protocol.samples >= 8


def test_the_aims_can_be_met_on_the_shipped_labels(demo: Callable[[str], ModuleType]) -> None:
    from mopo_kernels import load_preferences
    from mopo_kernels.data.report import win_rates
    from mopo_kernels.dual import solve_labels

    module = demo("protocol")
    protocol, data = module.load_protocol(), load_preferences(module.PREFERENCES)
    rates = win_rates(data)
    tau = protocol.training["tau"]
    solution = solve_labels(
        rates.win_rate, rates.reference, data.objectives, protocol.primary, protocol.aims, tau, estimator="snis"
    )
    assert solution.feasible
    assert any(multiplier > 0.05 for multiplier in solution.multiplier.values())


@pytest.fixture
def tiny(
    run: ModuleType, demo: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """The whole demo on a model of two layers that speaks in words w0 to w59; ``start`` runs it."""
    source = tmp_path / "source"
    model = make_model()
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    (source / "mopo_demo_model.json").write_text("{}")
    splits = {
        name: [f"w{k} w{k + first}" for k in range(6)] for first, name in enumerate(("train", "validation", "test"))
    }
    make_row = demo("make_data").make_row
    rows = [
        make_row(k, prompt, [" ".join(WORDS[k : k + n]) for n in (1, 3, 2, 5)])
        for k, prompt in enumerate(splits["train"])
    ]
    data = tmp_path / "preferences.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {name: {prompt: ["w1 w2", "w3 w4 w5"] for prompt in splits[name]} for name in ("validation", "test")}
    protocol = replace(
        demo("protocol").load_protocol(),
        primary="warmth",
        thresholds={"brevity": 0.4},
        aims={"brevity": 0.45},
        training={"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "tau": 0.5},
        control={},
        lora={"r": 2, "target_modules": "all-linear"},
        samples=2,
        validation_samples=1,
        scales=[0.5, 1.0],
        max_new_tokens=4,
        batch_size=6,
    )
    sampled: list[str] = []
    sample = run.sample_responses

    def counted(*arguments: Any, description: str, **options: Any) -> list[list[str]]:
        sampled.append(description)
        return sample(*arguments, description=description, **options)

    monkeypatch.setattr(run, "sample_responses", counted)
    monkeypatch.setattr(run, "load_protocol", lambda: protocol)
    monkeypatch.setattr(run, "check_digests", lambda protocol: None)
    monkeypatch.setattr(run, "PREFERENCES", data)
    monkeypatch.setattr(run, "read_base", lambda: base)
    monkeypatch.setattr(run, "validation_prompts", lambda: splits["validation"])
    monkeypatch.setattr(run, "test_prompts", lambda: splits["test"])
    monkeypatch.setattr(run, "has_fast_bfloat16", lambda device: False)
    out = tmp_path / "out"

    def start(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["run.py", "--output", str(out), "--model", str(source), *arguments])
        sampled.clear()
        return int(run.main())

    return SimpleNamespace(start=start, out=out, sampled=sampled, protocol=protocol)


def test_a_run_trains_finds_the_rival_judges_and_reports_and_one_resumed_samples_nothing_twice(
    tiny: SimpleNamespace,
) -> None:
    assert tiny.start() == 1  # warmth of these words is 0, so the primary gains nothing
    report = json.loads((tiny.out / "report.json").read_text())
    assert not all(report["claims"].values())
    assert report["claims_in_words"] == tiny.protocol.claims
    assert report["settings"]["thresholds"] == {"brevity": 0.4}
    assert (report["settings"]["seed"], report["settings"]["device"]) == (0, "cpu")
    assert list(report["win_rates"]) == list(report["bounds"]) == list(POLICIES)
    assert report["win_rates"]["constrained"]["win_rates"]["brevity"]["samples"] == 12
    assert report["turned_down"]["scale"] in (0.0, 0.5, 1.0)
    assert [len(report["history"][name]) >= 2 for name in ("constrained", "unconstrained")] == [True, True]
    for name in ("constrained", "unconstrained"):
        assert (tiny.out / name / "adapter_config.json").is_file()
        assert (tiny.out / f"training_{name}.png").is_file()
    assert (tiny.out / "plane_warmth_brevity.png").is_file()
    assert [name for name in tiny.sampled if "validation" in name]
    assert [name for name in tiny.sampled if "test" in name] == [
        "sampling test constrained",
        "sampling test unconstrained",
        "sampling test turned down",
    ]

    kept = {file.stem: json.loads(file.read_text())["key"] for file in (tiny.out / "answers").iterdir()}
    assert {key["seed"] for name, key in kept.items() if "validation" in name} == {0}
    assert [kept[f"test_{name}"]["seed"] for name in POLICIES] == [1, 2, 3]
    assert kept["test_turned_down"]["adapter"] == kept["test_unconstrained"]["adapter"]
    assert kept["test_turned_down"]["scale"] == report["turned_down"]["scale"]

    (tiny.out / "answers" / "test_unconstrained.json").unlink()  # as if interrupted before it was sampled
    assert tiny.start("--resume") == 1
    assert tiny.sampled == ["sampling test unconstrained"]
    again = json.loads((tiny.out / "report.json").read_text())
    assert again["win_rates"] == report["win_rates"]
    assert again["claims"] == report["claims"]


def test_the_documents_table_is_made_of_a_report(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import tables

    monkeypatch.setattr(tables, "DEMO", tiny.out)
    tiny.start()
    seeds = {"seeds": [1, 2], "failed": 0, "chance_of_failing": 0.0123, "devices": ["cuda"]}
    (tiny.out / "seeds.json").write_text(json.dumps(seeds))
    text = tables.demo()
    assert "Of 2 runs with seeds of their own on a GPU, 0 failed;" in text
    assert "in at most 1.2% of cases" in text
    report = json.loads((tiny.out / "report.json").read_text())
    for rates in report["win_rates"].values():
        for rate in rates["win_rates"].values():
            assert f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in text
    assert "| brevity | held at 0.40 |" in text
    assert "| warmth | maximised |" in text
    assert "| plain | watched |" in text
    assert f"adapter x {report['turned_down']['scale']:g}" in text
    assert "seed 0, trained in fp32" in text
    for image in re.findall(r"results/(\S+png)", text):
        assert (tiny.out / image).is_file()


def test_margins_are_those_of_the_claims_and_their_spread_gives_the_chance_of_failing(
    run: ModuleType, protocol: Any, demo: Callable[[str], ModuleType]
) -> None:
    seeds = demo("seeds")

    def report(seed: int, **changes: float) -> dict[str, Any]:
        found = comparisons(**changes)
        return {
            "claims": run.verify(protocol, found, 0.3),
            "settings": {"thresholds": protocol.thresholds, "primary": "warmth", "seed": seed, "device": "cpu"},
            "protocol": "p",
            "turned_down": {"scale": 0.3},
            "bounds": {
                name: {one: run.bounds(protocol, comparison, one) for one in protocol.thresholds}
                for name, comparison in found.items()
            },
            "difference": asdict(run.difference(protocol, found)),
            "win_rates": {name: comparison.as_dict(responses=False) for name, comparison in found.items()},
            "versions": {"commit": "c"},
        }

    changes: list[dict[str, float]] = [{}, {"constrained__plain": 0.42}, {"unconstrained__brevity": 0.42}]
    reports = [report(seed, **change) for seed, change in enumerate(changes)]
    for each in reports:
        assert [margin > 0 for margin in seeds.margins(each).values()] == list(each["claims"].values())
    found = seeds.summary(reports)
    assert found["failed"] == 2
    plain = found["claims"]["kept: plain"]
    normal = NormalDist(plain["mean"], plain["standard_deviation"])
    assert plain["chance_of_failing"] == pytest.approx(normal.cdf(0.0))
    assert 0.1 < plain["chance_of_failing"] < 0.5
    assert found["claims"]["gained"]["chance_of_failing"] < 1e-3
    assert found["chance_of_failing"] >= plain["chance_of_failing"]
    for bad, message in (
        (reports[:1], "at least 2; got 1"),
        ([reports[0], reports[0]], r"a seed each; got \[0, 0\]"),
        ([reports[0], reports[1] | {"protocol": "q"}], "one protocol; got several"),
    ):
        with pytest.raises(ValueError, match=message):
            seeds.summary(bad)


@pytest.mark.parametrize(
    ("found", "fast"), [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True}, False)]
)
def test_training_is_in_bfloat16_where_the_processor_multiplies_it(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert run.has_fast_bfloat16("cpu") is fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not run.has_fast_bfloat16("cpu")


def test_a_run_goes_on_under_the_same_protocol_and_seed_only(
    tiny: SimpleNamespace, run: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.start()
    for arguments, other in ((("--resume", "--seed", "1"), "another seed"), (("--resume",), "another protocol")):
        if other == "another protocol":
            monkeypatch.setattr(run, "load_protocol", lambda: replace(tiny.protocol, samples=3))
        with pytest.raises(SystemExit) as stopped:
            tiny.start(*arguments)
        assert stopped.value.code == 2
        assert other in capsys.readouterr().err


def test_a_run_that_starts_over_leaves_nothing_of_the_one_before(
    tiny: SimpleNamespace, run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [
        tiny.out / name for name in ("constrained/checkpoint-9/x", "answers/x.json", "report.json", "plane_a_b.png")
    ]
    for file in (*before, tiny.out / "model" / "mopo_demo_model.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")

    def seen(*arguments: Any) -> None:
        assert not any(file.exists() for file in before)
        assert (tiny.out / "model" / "mopo_demo_model.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", seen)
    with pytest.raises(KeyboardInterrupt):
        tiny.start()


@pytest.mark.parametrize("kind", ["file", "foreign folder", "older demo"])
def test_a_folder_that_is_no_place_for_the_run_is_refused_and_left_alone(
    tiny: SimpleNamespace, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "file":
        tiny.out.write_text("mine")
    else:
        (tiny.out / "constrained").mkdir(parents=True)
        (tiny.out / "constrained" / "mine.txt").write_text("mine")
    if kind == "older demo":
        (tiny.out / "model").mkdir()
        (tiny.out / "model" / "mopo_demo_model.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        tiny.start(*(["--resume"] if kind == "older demo" else []))
    assert stopped.value.code == 2
    expected = {"file": "is a file", "foreign folder": "holds other files", "older demo": "made by an older demo"}
    assert expected[kind] in capsys.readouterr().err
    assert (tiny.out if kind == "file" else tiny.out / "constrained" / "mine.txt").read_text() == "mine"


def test_a_missing_cuda_device_is_told_before_anything_is_run(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tiny.start("--device", "cuda")
    assert "this torch sees no CUDA device" in capsys.readouterr().err
    assert not tiny.out.exists()
