"""examples/paper: every piece runs on tiny random networks of the same architectures, from local folders."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from reward_stand_ins import SPECIAL, WORDS, build, tokenizer
from transformers import AutoModelForCausalLM, PhiConfig

from mopo_kernels import load_preferences
from mopo_kernels.data import PreferenceData
from mopo_kernels.evaluation import load_judges

PAPER = Path(__file__).parents[2] / "examples" / "paper"
STAND_INS = {"helpful": "gpt2", "harmless": "gpt2", "humour": "distilbert", "summary": "gpt2", "faithful": "bart"}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(PAPER), *sys.path])
    import recipe as module

    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Phi, the reward models' stand-ins, and both data sets in their own columns."""
    folder = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "phi")
    tokenizer("gpt2").save_pretrained(folder / "phi")
    lines = [f"import sys\nsys.path.insert(0, {str(PAPER)!r})\nfrom reward_models import ASSISTANT, SUMMARY\n"]
    for number, (name, kind) in enumerate(STAND_INS.items()):
        build(kind, folder / name, seed=number)
        lines.append(f"{{**ASSISTANT, **SUMMARY}}[{name!r}].model = {str(folder / name)!r}\n")
    (folder / "stand_ins.py").write_text("".join(lines))

    rng = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    for split, count in (("train", 140), ("test", 12)):
        starts = [f"\n\nHuman: {words(4, 6)}\n\nAssistant:" for _ in range(count)]
        write(
            folder / "hh" / f"{split}.jsonl",
            [{"chosen": f"{start} {words(3, 6)}", "rejected": f"{start} {words(1, 6)}"} for start in starts],
        )
    for split, count in (("train", 140), ("validation", 12)):
        rows = [
            {
                "info": {
                    "id": "t3",
                    "post": words(5, 12),
                    "title": "t",
                    "subreddit": "s",
                    "site": None,
                    "article": None,
                },
                "summaries": [{"text": f" {words(3, 6)}", "policy": "p", "note": None} for _ in range(2)],
                "choice": 0,
            }
            for _ in range(count)
        ]
        write(folder / "posts" / "comparisons" / split / "0000.jsonl", rows)
    return folder


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(place: Path, task: str, output: Path) -> list[str]:
    source, judges = {"assistant": ("hh", "ASSISTANT"), "summary": ("posts", "SUMMARY")}[task]
    return [
        *(task, "--output", str(output), "--model", str(place / "phi"), "--source", str(place / source)),
        *("--rewards", f"{place / 'stand_ins.py'}:{judges}", "--steps", "4", "--reference_steps", "2"),
        *("--learning_rate", "0.03"),
        *("--thresholds", "0.45", "--parts", "1", "--soup_parts", "2", "--test_prompts", "6", "--max_length", "200"),
    ]


@pytest.mark.parametrize(("task", "objectives"), [("assistant", 3), ("summary", 2)])
def test_the_whole_recipe_runs_and_goes_on_where_it_ended(
    place: Path, recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, objectives: int
) -> None:
    output = tmp_path / task
    asked = arguments(place, task, output)
    begun: list[str] = []
    train = recipe.train

    def interrupted(run: Any, data: PreferenceData, options: Any) -> Path:
        begun.append(run.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return Path(train(run, data, options))

    monkeypatch.setattr(recipe, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(asked)
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("adapter_model.safetensors")}
    assert len([path for path in kept if path.parent.name in begun[:2]]) == 2
    report = recipe.main(asked)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "trained twice"

    # Corners, alone and pairwise.
    soups = len(list(itertools.combinations(range(objectives), 2)))
    methods = {
        "MOPO": 1,
        "MOPO, moving reference": 1,
        "MOPO as printed": 1,
        "scalarised IPO": objectives,
        "scalarised DPO": objectives,
    }
    assert report["policies"] == methods | {"soup of DPO": soups}
    assert all(0 < volume < 100 for volume in report["hypervolume"].values())
    assert (output / "front.png").stat().st_size > 10_000
    assert json.loads((output / "front.json").read_text()) == report
    points = report["points"]
    assert all(abs(value) < 1e-12 for value in points["base"]["reward"].values())
    assert any(point["nondominated"] for point in points.values())
    assert len({round(point["reward"][report["objectives"][0]], 9) for point in points.values()}) > len(points) // 2

    data = load_preferences(output / "train.jsonl")
    assert list(data.objectives) == report["objectives"]
    assert len(data) == 140
    labels = [pair.preference[data.objectives[0]] for example in data for pair in example.pairs]
    assert len(set(labels)) > 100
    assert all(label is not None and 0 < label < 1 for label in labels)
    held = data.objectives[1]
    for name, moves in (("mopo_0.45", False), ("mopo_moving", True), ("mopo_as_printed", True)):
        history = json.loads((output / name / "history.json").read_text())
        bounds = {line[f"threshold/{held}"] for line in history if f"threshold/{held}" in line}
        assert (len(bounds) > 1) == moves

    with pytest.raises(ValueError, match=r"steps: expected 4, with which .* was begun; got 5"):
        recipe.main([*asked, "--steps", "5"])


def test_reward_models_read_what_ric_gives_them(recipe: ModuleType) -> None:
    judges = {
        **load_judges(f"{PAPER / 'reward_models.py'}:ASSISTANT"),
        **load_judges(f"{PAPER / 'reward_models.py'}:SUMMARY"),
    }
    prompt, post = "\n\nHuman: Tea?\n\nAssistant:", recipe.SUMMARY_TEMPLATE.format(post="A long post.")
    assert (
        post == "### Instruction: Generate a one-sentence summary of this post. ### Input: A long post. ### Response:"
    )
    found: dict[str, Any] = {name: judge.texts(prompt, " Yes. ") for name, judge in judges.items()}  # type: ignore[attr-defined]
    assert found["helpful"] == found["harmless"] == (prompt, "Yes.")
    assert found["humour"] == ("Yes.", None)
    found = {name: judge.texts(post, " Short. ") for name, judge in judges.items()}  # type: ignore[attr-defined]
    assert found["summary"] == ("Short. <|endoftext|> A long post.", None)
    assert found["faithful"] == ("Short.", "A long post.")
    # Of two outputs the second says "humorous" and "faithful".
    outputs = {name: (judge.output, judge.outputs) for name, judge in judges.items()}  # type: ignore[attr-defined]
    assert outputs == {
        **dict.fromkeys(("helpful", "harmless", "summary"), (0, 1)),
        **dict.fromkeys(("humour", "faithful"), (1, 2)),
    }


@pytest.mark.parametrize("weight", [(1.0, 0.0, 0.0), (0.25, 0.75, 0.0), (0.25, 0.25, 0.5)])
def test_scalarised_ipo_has_the_weighted_labels_over_tau_for_its_target(
    recipe: ModuleType, weight: tuple[float, ...]
) -> None:
    from mopo_kernels import naive

    names = ["a", "b", "c"]
    settings = recipe.weighted(names, weight, "regression", 0.08)
    multipliers = {} if settings["initial_multiplier"] == "zero" else settings["initial_multiplier"]
    vector = torch.tensor([1.0 if name == settings["primary"] else multipliers.get(name, 0.0) for name in names])
    labels = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    target = naive.pair_target(labels, vector, settings["tau"])
    torch.testing.assert_close(target, (labels - 0.5) @ torch.tensor(weight) / 0.08)


def test_weight_vectors_are_the_lattice(recipe: ModuleType) -> None:
    assert sorted(recipe.weight_vectors(2, 2)) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert len(recipe.weight_vectors(3, 4)) == 15
    assert all(sum(row) == 1 for row in recipe.weight_vectors(3, 4))


def test_the_front_is_measured_in_the_bases_units(recipe: ModuleType) -> None:
    rng = np.random.default_rng(0)
    base = {name: rng.normal(3, 2, (40, 2)) for name in ("a", "b")}

    def shifted(a: float, b: float, method: str) -> dict[str, Any]:
        moved = {"a": base["a"] + a * base["a"].std(), "b": base["b"] + b * base["b"].std()}
        return {"method": method, "scores": {name: values.tolist() for name, values in moved.items()}}

    results = {
        "base": shifted(0, 0, "base"),
        "up": shifted(1, 0, "one"),
        "both": shifted(2, 1, "two"),
        "down": shifted(-2, 3, "two"),
    }
    report = recipe.front(results, ["a", "b"])
    points = report["points"]
    assert points["up"]["reward"] == pytest.approx({"a": 1.0, "b": 0.0}, abs=1e-12)
    assert {name: point["nondominated"] for name, point in points.items()} == {
        "base": False, "up": False, "both": True, "down": True,
    }  # fmt: skip
    # Above a corner at -1 in both: the base a square of 1, "up" 2 x 1 in all; "both" 3 x 2; "down" is below in a.
    assert report["hypervolume"] == pytest.approx({"one": 2.0, "two": 6.0})
    assert points["up"]["win_rate"]["a"][0] > 0.6
    assert points["up"]["error"]["a"] == pytest.approx(
        base["a"].mean(1).std(ddof=1) / np.sqrt(40) / base["a"].std(), rel=1e-9
    )
