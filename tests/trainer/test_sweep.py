"""A sweep trains every point as a run of its own would, on one model in memory, and goes on where it was ended."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainer_samples import make_config, make_data, make_model, make_tokenizer

from mopo_kernels import cli, plots
from mopo_kernels.cli.train import train
from mopo_kernels.data.rendering import Renderer
from mopo_kernels.evaluation import compare
from mopo_kernels.tabular import nondominated
from mopo_kernels.trainer import MOPOTrainer, last_complete_checkpoint
from mopo_kernels.trainer.sweep import Sweep, SweepPoint, load_sweep

ROOT = Path(__file__).parents[2]
POINTS = [{}, {"brief": 0.6}, {"brief": 0.75}]
NAMES = ["no_thresholds", "brief=0.6", "brief=0.75"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The same number of threads as in the killed process: the order of sums is part of a bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_data(12).save(folder / "train.jsonl")
    make_data(5, seed=7).save(folder / "eval.jsonl")
    settings = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "eval_file": str(folder / "eval.jsonl"),
        "objectives": ["helpful", "brief"],
        "tau": 0.5,
        "lora_r": 2,
        # Dropout, so that a run depends on the random state that it starts from.
        "lora_dropout": 0.3,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 0.02,
        "initial_multiplier": "zero",
        "dual_lr": 10.0,
        "dual_data": 0.25,
        "dual_effective_prompts": 1,
        "dual_steps": 1,
        "dual_warmup_steps": 0,
        "reference": "precomputed",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(POINTS))
    return folder


def arguments(files, out, *more, points=None):
    """Of a sweep into ``out`` over the points of the module, or others."""
    file = files / "sweep.yaml"
    if points is not None:
        file = Path(out).with_name(f"{Path(out).name}_points.json")
        file.write_text(json.dumps(points))
    return ["--config", str(files / "config.yaml"), "--output_dir", str(out), "--sweep", str(file), *more]


def report_of(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(files, tmp_path_factory):
    """A sweep over the three points that nothing disturbed."""
    folder = tmp_path_factory.mktemp("swept") / "out"
    train(arguments(files, folder))
    return folder


TIMED = ("runtime", "per_second", "peak_memory", "total_flos")


def untimed(values):
    return {key: value for key, value in values.items() if not any(word in key for word in TIMED)}


def assert_same_run(first, second):
    """Adapter, optimiser and multiplier state, log and held-out metrics, bit for bit."""
    assert (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()
    summaries = [json.loads((folder / "training_summary.json").read_text()) for folder in (first, second)]
    for key in ("steps", "multiplier", "threshold", "in_sample", "dual"):
        assert summaries[0][key] == summaries[1][key], key
    assert untimed(summaries[0]["eval"]) == untimed(summaries[1]["eval"])
    for name in ("optimizer.pt", "mopo_state.pt"):
        states = [torch.load(folder / "checkpoint-4" / name, weights_only=True) for folder in (first, second)]
        for state in states:
            state.pop("window_seconds", None)
            state.get("settings", {}).pop("thresholds", None)
        assert str(states[0]) == str(states[1]), name
    logs = [json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text()) for folder in (first, second)]
    for one, other in zip(*(log["log_history"] for log in logs), strict=True):
        assert untimed(one) == untimed(other)


# The file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[{brief: 0.4}, {brief: 0.5, kind: 0.6}]", {"brief=0.4": {"brief": 0.4}, "brief=0.5,kind=0.6": None}),
        ('{"mild": {"brief": 0.4}, "free": {}}', {"mild": {"brief": 0.4}, "free": {}}),
        (
            "brief: [0.4, 0.5]\nkind: [0.6, null]",
            {
                "brief=0.4,kind=0.6": {"brief": 0.4, "kind": 0.6},
                "brief=0.4": {"brief": 0.4},
                "brief=0.5,kind=0.6": None,
                "brief=0.5": None,
            },
        ),
        ("[{'a/b c': 1}]", {"a_b_c=1.0": {"a/b c": 1.0}}),
        ("[{}]", {"no_thresholds": {}}),
    ],
    ids=["list", "named", "grid", "odd name", "unconstrained"],
)
def test_points_are_listed_named_or_a_grid(text, expected, tmp_path):
    (tmp_path / "sweep").write_text(text)
    points = {point.name: point.thresholds for point in load_sweep(tmp_path / "sweep")}
    assert list(points) == list(expected)
    assert all(points[name] == bounds for name, bounds in expected.items() if bounds is not None)


def test_thresholds_of_the_run_hold_where_a_point_says_nothing_and_null_lifts_them(tmp_path):
    (tmp_path / "sweep").write_text("[{brief: 0.4}, {brief: 0.5, kind: null}, {kind: 0.7}]")
    points = load_sweep(tmp_path / "sweep", {"kind": 0.6})
    assert [point.thresholds for point in points] == [{"kind": 0.6, "brief": 0.4}, {"brief": 0.5}, {"kind": 0.7}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a list of mappings of objective to threshold"),
        ("[]", "expected a list of mappings of objective to threshold"),
        ("{}", "expected a list of mappings of objective to threshold"),
        ("brief: 0.4", "expected a list of mappings of objective to threshold"),
        ("brief: []", "expected a list of mappings of objective to threshold"),
        ("[{brief: 0.4}, 3]", "expected a list of mappings of objective to threshold"),
        ("[{brief: high}]", r"sweep\[0\]: expected a mapping of objective to number.*got 'high' for 'brief'"),
        ("[{brief: .nan}]", r"sweep\[0\]\['brief'\]: expected a finite number"),
        ("[{brief: 0.4}, {brief: 0.40}]", "expected points that differ in name and thresholds"),
        ("{a: {brief: 0.4}, A: {brief: 0.5}}", "expected points that differ in name and thresholds"),
        ("{../a: {brief: 0.4}}", r"expected a name that can be a folder's; got '\.\./a'"),
        ("{a: {brief: 0.4}, a: {brief: 0.5}}", "'a' is given twice"),
        ("[{brief: 0.4, brief: 0.5}]", "'brief' is given twice"),
        ("[{", "is neither YAML nor JSON"),
    ],
)
def test_a_file_of_another_form_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "sweep").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_sweep(tmp_path / "sweep")
    assert str(caught.value).startswith("sweep")


@pytest.mark.parametrize(
    ("more", "points", "message"),
    [
        (["--sweep", "nowhere.yaml"], None, "sweep: cannot read nowhere.yaml: No such file or directory"),
        ([], [{"kind": 0.5}], "sweep: expected thresholds for objectives among brief; got one for kind in point"),
        ([], [{"helpful": 0.5}], "sweep: expected thresholds for objectives among brief; got one for helpful"),
        (["--resume_from_checkpoint", "x"], None, "resume_from_checkpoint: expected auto, true or false with sweep"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(more, points, message, files, tmp_path, capsys):
    assert cli.main(["train", *arguments(files, tmp_path / "out", *more, points=points)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_full_fine_tuning_is_refused(files, tmp_path, capsys):
    config = yaml.safe_load((files / "config.yaml").read_text())
    del config["lora_r"]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(config))
    more = ["--config", str(tmp_path / "full.yaml")]
    assert cli.main(["train", *arguments(files, tmp_path / "out"), *more]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "mopo: error: lora_r: expected a rank with sweep, which trains adapters on one frozen model; got none"
    )
    with pytest.raises(ValueError, match=r"^model: expected a PeftModel, as every point is an adapter"):
        Sweep([SweepPoint("a", {})], make_model(), make_config(tmp_path), make_data(), None, make_tokenizer(), dict)


# Training


def test_every_point_equals_a_run_of_its_own_bit_for_bit(files, swept, tmp_path):
    adapters = []
    for name, thresholds in zip(NAMES, POINTS, strict=True):
        alone = tmp_path / name
        bounds = ",".join(f"{key}={value}" for key, value in thresholds.items())
        train(["--config", str(files / "config.yaml"), "--output_dir", str(alone), "--thresholds", bounds])
        assert_same_run(alone, swept / name)
        adapters.append(load_file(alone / "adapter_model.safetensors"))
    # The thresholds act: the points are not one run three times.
    for first, second in itertools.pairwise(adapters):
        assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["autocast", "recomputed"])
def test_what_a_point_leaves_on_the_model_does_not_reach_the_next(changes, files, tmp_path):
    more = [item for name, value in changes.items() for item in (f"--{name}", str(value))]
    train(arguments(files, tmp_path / "both", *more, points=POINTS[1:]))
    train(arguments(files, tmp_path / "second", *more, points=POINTS[2:]))
    assert_same_run(tmp_path / "second" / NAMES[2], tmp_path / "both" / NAMES[2])


def test_one_backbone_one_reference_pass_and_one_tokenisation_serve_all_points(files, tmp_path, monkeypatch):
    seen, passes = [], []
    texts: list[tuple[Any, ...]] = []
    run, log_probabilities = MOPOTrainer.train, sys.modules["mopo_kernels.trainer.trainer"].reference_logprobs
    tokenize = Renderer.tokenize

    def watched(self, *args, **options):
        model = self.model
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held(model)}
        frozen = {name: value.data_ptr() for name, value in model.named_parameters() if not value.requires_grad}
        # The attributes, too: what the Trainer and accelerate hang on the model is taken off again.
        seen.append((storages, frozen, sum(value.numel() for value in model.parameters()), sorted(vars(model))))
        return run(self, *args, **options)

    def held(model):
        return [*model.parameters(), *model.buffers()]

    def counted(model, data, *args, **options):
        passes.append(len(data))
        return log_probabilities(model, data, *args, **options)

    def remembered(self, examples):
        texts.extend((example.prompt, example.responses) for example in examples)
        return tokenize(self, examples)

    monkeypatch.setattr(MOPOTrainer, "train", watched)
    monkeypatch.setattr("mopo_kernels.trainer.trainer.reference_logprobs", counted)
    monkeypatch.setattr(Renderer, "tokenize", remembered)
    train(arguments(files, tmp_path / "out"))
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert passes == [12, 5]
    report = report_of(tmp_path / "out")
    model = make_model()
    assert report["shared"]["backbone_bytes"] == sum(value.nbytes for value in model.parameters())
    # A fingerprint may tokenise an example of its own, whose words are not the data's.
    own = [text for text in texts if text[0].startswith("w")]
    assert len(set(own)) == len(own) == 17


def test_the_report_has_what_every_point_came_to(files, swept):
    report = report_of(swept)
    assert [record["name"] for record in report["points"]] == NAMES
    assert (report["primary"], report["compared"], report["front"]) == ("helpful", ["helpful", "brief"], "eval")
    values = []
    for record, thresholds in zip(report["points"], POINTS, strict=True):
        summary = json.loads((swept / record["name"] / "training_summary.json").read_text())
        assert record["status"] == "trained"
        assert (record["thresholds"], record["multiplier"]) == (thresholds, summary["multiplier"])
        assert record["satisfaction"]["train"] == summary["in_sample"]
        for name in ("helpful", "brief"):
            assert record["satisfaction"]["eval"][name] == summary["eval"][f"eval_satisfaction/{name}"]
        for part in ("train", "eval"):
            assert record["primary"][part] == record["satisfaction"][part]["helpful"]
            for name, bound in thresholds.items():
                assert record["slack"][part][name] == record["satisfaction"][part][name] - bound
        assert record["kl"]["eval"] == summary["eval"]["eval_kl_first"] >= 0
        assert record["kl"]["train"] >= 0
        assert record["seconds"] > 0
        assert record["peak_memory_mib"] > 10
        values.append([record["satisfaction"]["eval"][name] for name in ("helpful", "brief")])
    marks = nondominated(np.array(values))
    assert [record["nondominated"] for record in report["points"]] == marks.tolist()
    assert report["shared"]["loading_seconds"] > 0
    assert report["shared"]["reference_seconds"] > 0
    text = (swept / "sweep.md").read_text()
    for record in report["points"]:
        assert f"| {record['name']} | {record['satisfaction']['train']['helpful']:.3f} |" in text
        assert f"| {record['name']} | {record['satisfaction']['eval']['helpful']:.3f} |" in text
    assert (swept / "front.png").read_bytes().startswith(b"\x89PNG")


def test_points_that_cannot_be_met_are_recorded_and_the_others_go_on(files, tmp_path, capsys):
    points = {"labels": {"brief": 0.99}, "training": {"brief": 0.9}, "met": {"brief": 0.3}}
    options = ["--dual_max", "0.2", "--dual_patience", "2", "--dual_lr", "5", "--initial_multiplier", "labels"]
    # Both are beyond what the labels give, so the second is found out in training only when the labels are not asked.
    train(arguments(files, tmp_path / "a", *options, points={"labels": points["labels"], "met": points["met"]}))
    first, met = report_of(tmp_path / "a")["points"]
    assert (first["status"], met["status"]) == ("infeasible", "trained")
    assert "on the training labels" in first["message"]
    options[-1] = "zero"
    train(arguments(files, tmp_path / "b", *options, points={"training": points["training"], "met": points["met"]}))
    second, met = report_of(tmp_path / "b")["points"]
    assert (second["status"], met["status"]) == ("infeasible", "trained")
    assert "threshold brief >= 0.90 cannot be met: best seen" in second["message"]
    assert f"* training: infeasible: {second['message']}" in (tmp_path / "b" / "sweep.md").read_text()
    assert f"[1/2] training: infeasible: {second['message']}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        train(arguments(files, tmp_path / "c", *options, points=[points["training"]]))
    assert caught.value.code == 1


def test_a_point_that_diverges_is_recorded_and_the_next_starts_from_the_first_weights(files, tmp_path, monkeypatch):
    begin = MOPOTrainer._begin_step

    def poisoned(self):
        begin(self)
        if self.args.output_dir.endswith(NAMES[1]) and self.state.global_step == 2:
            with torch.no_grad():
                next(value for value in self.model.parameters() if value.requires_grad).fill_(float("nan"))

    monkeypatch.setattr(MOPOTrainer, "_begin_step", poisoned)
    train(arguments(files, tmp_path / "out", points=POINTS[1:]))
    bad, good = report_of(tmp_path / "out")["points"]
    assert (bad["status"], good["status"]) == ("diverged", "trained")
    assert "are not finite" in bad["message"]
    train(arguments(files, tmp_path / "alone", points=POINTS[2:]))
    assert_same_run(tmp_path / "alone" / NAMES[2], tmp_path / "out" / NAMES[2])


# Going on

KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from mopo_kernels.cli.train import train
from mopo_kernels.trainer import MOPOTrainer

begin = MOPOTrainer._begin_step

def kill(self):
    begin(self)
    if self.args.output_dir.endswith(sys.argv[1]) and self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

MOPOTrainer._begin_step = kill
train(sys.argv[2:])
"""


def stamps(folder):
    return {name: (folder / name / "adapter_model.safetensors").stat().st_mtime_ns for name in NAMES[:1]}


def test_a_killed_sweep_skips_what_is_finished_and_resumes_what_was_under_way(files, swept, tmp_path, capsys):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, NAMES[1], *arguments(files, out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [record["status"] for record in report_of(out)["points"]] == ["trained", "running", "pending"]
    before = stamps(out)
    train(arguments(files, out))
    assert stamps(out) == before
    records = report_of(out)["points"]
    assert records[1]["resumed_from"] == str(out / NAMES[1] / "checkpoint-2")
    assert records[0]["resumed_from"] is None
    for name in NAMES:
        assert_same_run(swept / name, out / name)
    assert "[1/3] no_thresholds: 4 steps" in capsys.readouterr().out


def test_ctrl_c_exits_130_and_the_same_command_goes_on(files, swept, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    begin = MOPOTrainer._begin_step

    def interrupt(self):
        begin(self)
        if self.args.output_dir.endswith(NAMES[1]) and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MOPOTrainer, "_begin_step", interrupt)
        with pytest.raises(SystemExit) as caught:
            train(arguments(files, out))
    assert caught.value.code == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "mopo: sweep interrupted; the same command goes on"
    assert last_complete_checkpoint(out / NAMES[1]) == str(out / NAMES[1] / "checkpoint-3")
    assert not (out / NAMES[2]).exists()
    train(arguments(files, out))
    for name in NAMES:
        assert_same_run(swept / name, out / name)


@pytest.fixture
def finished(files, tmp_path):
    train(arguments(files, tmp_path / "out", "--max_steps", "1", points=POINTS[:2]))
    return tmp_path / "out"


def test_a_finished_sweep_trains_new_points_only(files, finished, monkeypatch):
    trained = []
    run = MOPOTrainer.train
    monkeypatch.setattr(
        MOPOTrainer, "train", lambda self, **k: (trained.append(self.args.output_dir), run(self, **k))[1]
    )
    train(arguments(files, finished, "--max_steps", "1", points=POINTS))
    assert trained == [str(finished / NAMES[2])]
    assert [record["status"] for record in report_of(finished)["points"]] == ["trained"] * 3
    before = stamps(finished)
    train(arguments(files, finished, "--max_steps", "1", points=POINTS))
    assert len(trained) == 1
    assert stamps(finished) == before
    (finished / NAMES[0] / "adapter_config.json").unlink()
    train(arguments(files, finished, "--max_steps", "1", "--logging_steps", "2", points=POINTS))
    assert trained[1:] == [str(finished / NAMES[0])]
    train(arguments(files, finished, "--max_steps", "1", "--resume_from_checkpoint", "false", points=POINTS))
    assert len(trained) == 5


@pytest.mark.parametrize(
    ("more", "points", "message"),
    [
        (["--tau", "0.4"], POINTS[:2], "tau: expected 0.5, with which "),
        (["--lora_alpha", "3"], POINTS[:2], "lora_alpha: expected None, with which "),
        (["--max_examples", "10"], POINTS[:2], "data: expected '"),
        ([], {"no_thresholds": {"brief": 0.4}}, "sweep: expected thresholds {} for point no_thresholds, as "),
    ],
)
def test_a_sweep_of_other_settings_is_refused(more, points, message, files, finished, capsys):
    assert cli.main(["train", *arguments(files, finished, "--max_steps", "1", *more, points=points)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"mopo: error: {message}")
    assert line.endswith("(another output_dir, or resume_from_checkpoint=false, begins afresh)")


def test_every_point_is_a_wandb_run_of_its_own(files, tmp_path, monkeypatch):
    ended = []

    class Wandb:
        run: object = None

        @classmethod
        def finish(cls):
            ended.append(cls.run)
            cls.run = None

    run = MOPOTrainer.train

    def logged(self, **options):
        assert Wandb.run is None
        Wandb.run = self.args.run_name
        return run(self, **options)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setattr(MOPOTrainer, "train", logged)
    train(arguments(files, tmp_path / "out", "--max_steps", "1", "--run_name", "mine", points=POINTS[:2]))
    assert ended == ["mine/no_thresholds", "mine/brief=0.6"]


# Evaluation


def test_eval_of_a_sweep_equals_evals_of_its_points_and_samples_the_base_once(swept, tmp_path, monkeypatch, capsys):
    (tmp_path / "judges.py").write_text(
        "JUDGES = {'helpful': lambda prompt, response: len(response), 'brief': lambda p, r: -len(r.split())}\n"
    )
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\nw4 w5 w6\n")
    common = ["--prompts", str(tmp_path / "prompts.txt"), "--judges", f"{tmp_path / 'judges.py'}:JUDGES"]
    common += ["--max_new_tokens", "5", "--samples", "3", "--device", "cpu"]
    drawn, loaded = [], []
    draw = compare.sample_responses
    monkeypatch.setattr(compare, "sample_responses", lambda *a, **k: (drawn.append(k["description"]), draw(*a, **k))[1])
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (loaded.append(a), load(*a, **k))[1])
    files = ["--output", str(tmp_path / "eval.json"), "--plot", str(tmp_path / "eval.png")]
    assert cli.main(["eval", "--policy", str(swept), *common, *files, "--threshold", "brief=0.4"]) == 0
    assert len(loaded) == 1
    assert [text for text in drawn if "baseline" in text] == ["sampling the baseline (base)"]
    assert len(drawn) == 4
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "eval.json").read_text())
    assert list(report["points"]) == NAMES
    assert report["compared"] == ["helpful", "brief"]
    means = [[point["win_rates"][name]["mean"] for name in ("helpful", "brief")] for point in report["points"].values()]
    assert [point["nondominated"] for point in report["points"].values()] == nondominated(means).tolist()
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    samples = set()
    for name, point in report["points"].items():
        alone = tmp_path / f"{name}.json"
        assert cli.main(["eval", "--policy", str(swept / name), *common, "--output", str(alone)]) == 0
        expected = json.loads(alone.read_text())
        for key in ("win_rates", "samples", "length"):
            assert point[key] == expected[key], (name, key)
        samples.add(json.dumps([sample["candidate"] for sample in point["samples"]]))
        rate = point["win_rates"]["helpful"]
        assert f"{name} " in shown
        assert f"{rate['mean']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})" in shown
    assert len(samples) == 3


def test_eval_of_a_sweep_refuses_what_does_not_fit(swept, tmp_path, capsys):
    (tmp_path / "judges.py").write_text("JUDGES = {'kind': lambda prompt, response: len(response)}\n")
    (tmp_path / "prompts.txt").write_text("w1\nw2\n")
    common = ["eval", "--prompts", str(tmp_path / "prompts.txt"), "--judges", f"{tmp_path / 'judges.py'}:JUDGES"]
    assert cli.main([*common, "--policy", str(swept), "--policy_adapter", "x"]) == 2
    assert "--policy_adapter, --policy_scale: expected neither with a sweep" in capsys.readouterr().err
    assert cli.main([*common, "--policy", str(swept), "--plot", str(tmp_path / "x.png")]) == 2
    assert "--y: expected one of kind; got helpful" in capsys.readouterr().err
    assert cli.main([*common, "--policy", str(swept), "--plot", str(tmp_path / "x.png"), "--y", "kind"]) == 2
    assert "--x: expected one of kind; got None" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    report = {"primary": "kind", "compared": ["kind"], "points": [{"name": "a", "status": "infeasible"}]}
    (tmp_path / "empty" / "sweep.json").write_text(json.dumps(report))
    assert cli.main([*common, "--policy", str(tmp_path / "empty")]) == 2
    assert "expected a sweep with a trained point; got 1 points without" in capsys.readouterr().err


def test_the_picture_has_every_policy_its_threshold_and_the_front(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (drawn.append(figure), Path(path))[1])
    values = {f"p{i}": {"y": 0.5 + 0.01 * i, "a": 0.6 - 0.01 * i, "b": 0.4} for i in range(7)}
    values["bad"] = {"y": 0.5, "a": 0.5, "b": 0.4}
    front = [name for name in values if name != "bad"]
    plots.plot_policies(
        values,
        tmp_path / "x.png",
        x=["a"],
        y="y",
        nondominated=front,
        scale="win rate",
        bounds={"p1": {"a": 0.55}},
        intervals={"p2": {"a": (0.5, 0.7), "y": (0.45, 0.6)}},
        parity="base",
    )
    axes = drawn[0].axes[0]
    styles = {}
    for container in axes.containers:
        line = container.lines[0]
        name = container.get_label().removesuffix(" (dominated)")
        assert line.get_xydata().tolist() == [[values[name]["a"], values[name]["y"]]]
        assert (line.get_markerfacecolor() == "white") == (name == "bad")
        styles[name] = (line.get_color(), line.get_marker())
        assert container.has_xerr == (name == "p2")
    assert len(set(styles.values())) == len(values) == len(styles)
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["a policy's threshold"] == [[0.55, values["p1"]["y"]]]
    stairs = lines["attained: below and to the left"]
    assert stairs == sorted([values[name]["a"], values[name]["y"]] for name in front)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()].count("base (0.5, 0.5)") == 1
    plots.plot_policies(values, tmp_path / "x.png", x=["a", "b"], y="y", nondominated=front, scale="win rate")
    assert [ax.get_xlabel() for ax in drawn[1].axes] == ["a: win rate", "b: win rate"]
    with pytest.raises(
        ValueError, match=r"values: expected every objective drawn; got none of \['c'\] for policy 'p0'"
    ):
        plots.plot_policies(values, tmp_path / "x.png", x=["c"], y="y", nondominated=[], scale="win rate")


def test_without_moocore_a_sweep_stops_before_the_work_and_without_matplotlib_it_has_no_picture(
    files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "moocore", None)
    assert cli.main(["train", *arguments(files, tmp_path / "none")]) == 1
    assert "moocore is not installed" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    monkeypatch.undo()
    monkeypatch.setattr("mopo_kernels.cli.sweep.importlib.util.find_spec", lambda name: None)
    train(arguments(files, tmp_path / "out", "--max_steps", "1", points=POINTS[:2]))
    assert "a picture needs matplotlib: pip install 'mopo-kernels[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "out" / "front.png").exists()
