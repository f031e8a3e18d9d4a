"""mopo train: a file and overrides in, a policy and a summary out; one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trainer_samples import make_data, make_model, make_tokenizer

from mopo_kernels import cli
from mopo_kernels.cli.train import empty_model, load_data, load_model, parse, train
from mopo_kernels.data import PreferenceCollator, load_preferences
from mopo_kernels.data.synthetic import byte_tokenizer, random_preferences
from mopo_kernels.trainer import last_complete_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_data(12).save(folder / "train.jsonl")
    make_data(4, seed=7).save(folder / "eval.jsonl")
    settings = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "objectives": ["helpful", "brief"],
        "thresholds": {"brief": 0.45},
        "tau": 0.5,
        "lora_r": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def arguments(files, *more):
    return ["--config", str(files / "config.yaml"), *more]


def test_the_command_line_overrides_the_file(files):
    model, data, config = parse(arguments(files, "--tau", "0.25", "--max-steps", "7", "--thresholds", "brief=0.4"))
    assert (config.tau, config.max_steps, config.thresholds) == (0.25, 7, {"brief": 0.4})
    assert (config.learning_rate, config.objectives, model.lora_r) == (1e-3, ["helpful", "brief"], 2)
    assert data.train_file == str(files / "train.jsonl")
    assert config.use_cpu is True


def test_splits_of_a_local_folder_are_read_by_their_names_with_columns_mapped(files, tmp_path):
    for split in ("train_prefs", "test_prefs", "train_sft"):
        row = {"topic": split, "persona": "Be brief.", "chosen": "a", "rejected": "b"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    options = [
        "--train_file",
        str(tmp_path),
        "--train_split",
        "train_prefs",
        "--objectives",
        "kind",
        "--thresholds",
        "",
    ]
    more = ["--columns", "prompt=topic,system=persona", "--eval_split", "test"]
    _, data, config = parse(arguments(files, *options, *more))
    parts: Any = load_data(data, config, make_tokenizer())
    assert [[[turn["content"] for turn in example.prompt] for example in part] for part in parts] == [
        [["Be brief.", "train_prefs"]],
        [["Be brief.", "test_prefs"]],
    ]
    assert [part.objectives for part in parts] == [("kind",), ("kind",)]


def test_objectives_can_be_listed_with_commas_or_spaces(files):
    for form in (["helpful,brief"], ["helpful", "brief"]):
        assert parse(arguments(files, "--objectives", *form))[2].objectives == ["helpful", "brief"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--taau", "0.1"], "unknown argument --taau 0.1"),
        (["--ta", "0.1"], "unknown argument --ta 0.1"),
        (["--tau", "big"], "argument --tau: invalid float value: 'big'"),
        (["--tau", "-1"], "tau: expected a number in [1e-10, 1e+10]; got -1.0"),
        (["--thresholds", "brief"], "thresholds: expected a mapping"),
        (["--primary", "kind"], "primary: expected one of helpful, brief; got 'kind'"),
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", ""], "model_name_or_path: expected a folder or hub name"),
        (["--dataset_name", "some/set"], "train_file: expected it or dataset_name, not both; got both"),
        (["--eval_split", "test"], "no split 'test', there is: train"),
        (["--eval_fraction", "1.5"], "eval_fraction: expected a share in [0, 1); got 1.5"),
        (["--eval_file", "x.jsonl", "--eval_fraction", "0.1"], "eval_file: expected one way to hold data out"),
        (["--data_options", "[1]"], "data_options: expected a mapping"),
        (["--dtype", "int8"], "dtype: expected auto, float32, bfloat16 or float16; got 'int8'"),
        (["--lora_r", "0"], "lora_r: expected a positive rank"),
        (
            ["--thresholds", "brief=0.99"],
            "thresholds: on the training labels (estimator pair, dual_max 10): threshold brief >= 0.99 cannot be met",
        ),
        (["--config", "nowhere.yaml"], "config: cannot read nowhere.yaml: No such file or directory"),
        (["--model_name_or_path", "./nowhere"], "expected a folder or hub name; there is no folder ./nowhere"),
        (["--model_name_or_path", "~/nowhere"], "expected a folder or hub name; there is no folder ~/nowhere"),
        (
            ["--model_name_or_path", "a/b/c"],
            "model_name_or_path: expected a folder or hub name; there is no folder a/b/c",
        ),
        (["--objectives", "helpful,kind"], "objectives: expected names among helpful, brief, which"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint: expected a complete checkpoint in output_dir"),
    ],
)
def test_bad_arguments_exit_2_with_one_line_that_names_them(more, message, files, capsys, tmp_path):
    assert cli.main(["train", *arguments(files, "--output_dir", str(tmp_path), *more)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("mopo: error: ")


def test_a_folder_without_a_model_and_a_model_that_cannot_be_loaded_are_named(files, tmp_path, capsys):
    def error(model):
        assert cli.main(["train", *arguments(files, "--model_name_or_path", str(model), "--output_dir", "runs")]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert error(tmp_path) == (
        f"mopo: error: model_name_or_path: expected a folder with a config.json; {tmp_path} has none"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert error(tmp_path).startswith(f"mopo: error: model_name_or_path: {tmp_path} cannot be loaded: ")
    make_tokenizer().save_pretrained(tmp_path)
    assert error(tmp_path).startswith(f"mopo: error: model_name_or_path: {tmp_path} cannot be loaded: ")


def test_a_hub_name_that_cannot_be_loaded_is_named(files, capsys, monkeypatch, tmp_path):
    def unreachable(*args, **options):
        raise OSError("no connection")

    monkeypatch.setattr("mopo_kernels.cli.train.AutoTokenizer.from_pretrained", unreachable)
    more = ["--model_name_or_path", "some/model", "--output_dir", str(tmp_path)]
    assert cli.main(["train", *arguments(files, *more)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "mopo: error: model_name_or_path: some/model cannot be loaded: no connection"


def test_an_output_folder_that_is_a_file_is_named(files):
    for below in ("", "/run"):
        with pytest.raises(ValueError, match=r"^output_dir: expected a folder, .*; .*train\.jsonl is a file"):
            parse(arguments(files, "--output_dir", str(files / "train.jsonl") + below))


def test_some_of_the_objectives_of_a_file_can_be_chosen(files, tmp_path):
    more = ["--output_dir", str(tmp_path), "--thresholds", "", "--objectives"]
    for chosen in (["brief"], ["brief", "helpful"]):
        train(arguments(files, *more, *chosen))
        summary = json.loads((tmp_path / "training_summary.json").read_text())
        assert summary["objectives"] == chosen
        assert set(summary["in_sample"]) == set(chosen)


def test_the_name_that_a_single_objective_format_needs_is_still_given_by_objectives(files, tmp_path):
    """Its rows have no names to choose from."""
    rows = [
        {"prompt": "w1", "chosen": " w2 w3", "rejected": " w4"},
        {"prompt": "w5", "chosen": " w6", "rejected": " w7"},
    ]
    (tmp_path / "trl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--train_file", str(tmp_path / "trl.jsonl"), "--objectives", "kind", "--thresholds", ""]
    train(arguments(files, "--output_dir", str(tmp_path), *more))
    assert json.loads((tmp_path / "training_summary.json").read_text())["objectives"] == ["kind"]


def test_unknown_and_malformed_files_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    for text, message in (
        ("taau: 0.1\ntau: 0.1", "config: unknown key taau in"),
        ("- 1", "config: expected keys and values in"),
        ("a: [1", "is not YAML"),
        ("tau: big", "argument --tau: invalid float value: 'big'"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(["--config", str(file)])


def test_a_run_saves_adapters_and_a_summary(files, tmp_path, capsys):
    train(arguments(files, "--output_dir", str(tmp_path), "--eval_fraction", "0.25", "--split_seed", "3"))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["objectives"] == ["helpful", "brief"]
    assert summary["primary"] == "helpful"
    assert summary["steps"] == 3
    assert summary["threshold"] == {"brief": 0.45}
    assert set(summary["multiplier"]) == {"brief"}
    assert 0 < summary["eval"]["eval_satisfaction/brief"] < 1
    assert summary["versions"]["torch"] == version("torch")
    output = capsys.readouterr().out
    assert "objectives helpful, brief" in output
    assert f"saved {tmp_path}" in output


def test_full_fine_tuning_with_a_held_out_file_changes_the_weights(files, tmp_path):
    from safetensors.torch import load_file

    config = yaml.safe_load((files / "config.yaml").read_text())
    del config["lora_r"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    train(
        [
            *("--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out")),
            *("--eval_file", str(files / "eval.jsonl")),
        ]
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (files / "model", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_over_long_examples_can_be_left_out(files, tmp_path, capsys):
    more = ["--output_dir", str(tmp_path), "--max_response_length", "6"]
    assert cli.main(["train", *arguments(files, *more)]) == 2
    assert "more than the 6" in capsys.readouterr().err
    train(arguments(files, *more, "--skip_overlong"))
    assert "bad rows were left out" in capsys.readouterr().out


def test_resume_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(files, tmp_path):
    more = [
        "--output_dir",
        str(tmp_path),
        "--resume_from_checkpoint",
        "auto",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    ]
    train(arguments(files, *more))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    train(arguments(files, *more, "--max_steps", "5"))
    assert json.loads((tmp_path / "training_summary.json").read_text())["steps"] == 5
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"]] == [1, 2, 3, 4, 5]


def test_resuming_a_finished_run_says_so_and_leaves_its_results_as_they_were(files, tmp_path, caplog):
    more = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto", "--save_strategy", "steps"]
    train(arguments(files, *more))
    kept = {name: (tmp_path / name).read_bytes() for name in ("training_summary.json", "adapter_model.safetensors")}
    train(arguments(files, *more))
    assert "nothing left to train" in caplog.text
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    (tmp_path / "training_summary.json").unlink()
    train(arguments(files, *more))
    assert json.loads((tmp_path / "training_summary.json").read_text())["train"] is None


def test_a_checkpoint_of_other_settings_is_refused_in_one_line(files, tmp_path, capsys):
    more = ["--output_dir", str(tmp_path), "--save_strategy", "steps"]
    train(arguments(files, *more))
    assert cli.main(["train", *arguments(files, *more, "--tau", "0.3", "--resume_from_checkpoint", "true")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == (
        f"mopo: error: tau: expected 0.5, with which {tmp_path / 'checkpoint-3'} was trained; got 0.3 (without "
        "resume_from_checkpoint a run starts afresh)"
    )


def test_ctrl_c_exits_130_with_one_line_and_a_checkpoint(files, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "mopo_kernels.cli", "train"),
            *arguments(files, "--output_dir", str(tmp_path), "--max_steps", "100000"),
        ],
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # The first log line tells that training has begun.
        while "'loss'" not in (line := child.stdout.readline()):
            assert line or child.poll() is None, child.stderr.read()
            time.sleep(0.001)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    checkpoint = last_complete_checkpoint(tmp_path)
    assert checkpoint is not None
    assert errors.strip().splitlines()[-1] == f"mopo: training interrupted; resume with {checkpoint}"


def test_an_impossible_threshold_found_in_training_exits_1_and_names_the_checkpoint(files, tmp_path, capsys):
    more = ["--thresholds", "brief=0.95", "--initial_multiplier", "zero", "--dual_max", "0.1", "--dual_lr", "1.0"]
    more += ["--dual_data", "0.25", "--dual_effective_prompts", "1", "--dual_steps", "1", "--dual_warmup_steps", "0"]
    with pytest.raises(SystemExit) as caught:
        train(arguments(files, "--output_dir", str(tmp_path), *more, "--dual_patience", "2", "--max_steps", "9"))
    assert caught.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "threshold brief >= 0.95 cannot be met: best seen" in line
    assert str(last_complete_checkpoint(tmp_path)) in line


def test_help_lists_the_keys(capsys):
    with pytest.raises(SystemExit) as caught:
        train(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in ("thresholds", "tau", "lora_r", "train_file", "config"))


def test_the_example_configuration_trains(files, tmp_path):
    """As it stands, but for the names of the objectives and the length of the run."""
    example = [
        *("--config", str(ROOT / "configs" / "two_objectives.yaml"), "--output_dir", str(tmp_path)),
        *("--model_name_or_path", str(files / "model"), "--train_file", str(files / "train.jsonl"), "--use_cpu"),
    ]
    model, data, config = parse(example)
    assert (config.objectives, config.thresholds) == (["helpful", "harmless"], {"harmless": 0.48})
    assert config.learning_rate == 1e-4
    assert model.lora_target_modules == "all-linear"
    assert data.skip_overlong is True
    train([*example, "--objectives", "helpful,brief", "--thresholds", "brief=0.48", "--report_to", "none"])
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["steps"] == 2, "11 prompts are left, 8 a step"
    assert "eval_satisfaction/brief" in summary["eval"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend is there")
def test_a_backend_that_is_not_there_is_one_line_before_the_model_loads(files, capsys, monkeypatch):
    monkeypatch.setattr("mopo_kernels.cli.train.AutoTokenizer", None)
    assert cli.main(["train", *arguments(files, "--backend", "cuda")]) == 2
    assert capsys.readouterr().err.startswith("mopo: error: backend 'cuda' is not available: ")


TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 260}
RANDOM = [
    *("--random_weights", "true", "--architecture", "llama", "--architecture_options", json.dumps(TINY)),
    *("--max_steps", "2", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no"),
    *("--thresholds", "second=0.3", "--per_device_train_batch_size", "2", "--logging_steps", "1"),
    *("--random_data", "examples=6,responses=3,prompt_length=8,response_length=10"),
]


@pytest.fixture
def offline(monkeypatch):
    """Asking for anything by name is an error."""

    def fail(*args, **options):
        raise AssertionError(f"asked for {args[0]}")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"mopo_kernels.cli.train.{name}.from_pretrained", fail)


@pytest.mark.usefixtures("offline")
def test_random_weights_train_on_random_data_without_any_file(tmp_path, capsys):
    train([*RANDOM, "--output_dir", str(tmp_path), "--model_name_or_path", "some/model", "--dtype", "bfloat16"])
    output = capsys.readouterr().out
    assert "note: random weights and a byte-level tokenizer, trained on random data\n" in output
    assert "6 examples, 18 pairs, objectives first, second\n" in output
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert (summary["steps"], summary["model"]) == (2, "llama with random weights")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["dtype"]) == (16, "bfloat16")
    assert "| Base model | llama with random weights |" in (tmp_path / "README.md").read_text()


def test_random_weights_in_the_shape_of_a_folder(files, tmp_path, capsys):
    train(arguments(files, "--random_weights", "true", "--output_dir", str(tmp_path), "--max_steps", "1"))
    assert "note: random weights and its folder's tokenizer\n" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"{files / 'model'} with random weights"


def test_random_weights_have_their_dtype_from_the_start_and_follow_the_seed():
    model, _, _ = parse([*RANDOM, "--dtype", "bfloat16"])
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(load_model(model, torch.device("cpu")))
    assert {parameter.dtype for parameter in made[0].parameters()} == {torch.bfloat16}
    first, again, other = (value.model.embed_tokens.weight for value in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert {value.device.type for value in empty_model(model, torch.device("meta")).parameters()} == {"meta"}


def test_the_byte_tokenizer_gives_every_text_back_a_token_a_byte():
    tokenizer = byte_tokenizer()
    text = "Grüße,\n\t世界 \x00 <eos"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258)


def test_random_data_follows_its_seed_and_sizes():
    def made(**changes):
        return list(random_preferences(["a", "b"], **{"examples": 20, "prompt_length": 9, "seed": 1, **changes}))

    data = made()
    assert data == made()
    assert data != made(seed=2)
    assert {len(example.prompt) for example in data} == {5, 6, 7, 8, 9}
    assert {len(example.responses) for example in made(responses=3)} == {3}
    labels = [pair.preference for example in data for pair in example.pairs]
    assert len(labels) == 20 * 6
    assert {label["a"] == label["b"] for label in labels} == {True, False}
    with pytest.raises(ValueError, match="responses: expected at least 2; got 1"):
        made(responses=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--architecture", ""], "architecture: "),
        (["--architecture", "nonesuch"], "such as llama, phi or opt; got 'nonesuch'"),
        (["--architecture", "t5", "--architecture_options", "{}"], "architecture: t5 makes no causal language model"),
        (["--architecture_options", "[1]"], "architecture_options: expected a mapping"),
        (["--random_data", "rows=3"], "random_data: expected sizes among examples, responses, prompt_length"),
        (["--random_data", "examples=0"], "examples: expected at least 1; got 0"),
        (["--train_file", "x.jsonl"], "random_data: expected it without train_file and dataset_name; got both"),
        (["--merge_adapters", "true"], "lora_r: expected a rank with merge_adapters; got none"),
        (["--random_weights", "false"], "model_name_or_path: expected a folder or hub name; got none"),
        (["--random_weights", "false", "--model_name_or_path", "x"], "random_data: expected it with random_weights"),
    ],
)
def test_random_weights_that_cannot_work_are_refused_in_one_line(more, message, capsys, tmp_path):
    assert cli.main(["train", *RANDOM, "--output_dir", str(tmp_path), *more]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


PHI, OPT = 1_418_270_720, 1_315_758_080


@pytest.mark.parametrize(("name", "parameters"), [("phi", PHI), ("opt", OPT)])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_the_large_configurations_have_the_shapes_they_are_named_for(name, parameters, how):
    example = ["--config", str(ROOT / "configs" / f"{name}_1b_{how}.yaml"), "--use_cpu", "--random_weights"]
    model, _, config = parse(example)
    base = empty_model(model, torch.device("meta"))
    assert sum(parameter.numel() for parameter in base.parameters()) == parameters
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    assert (model.lora_r is None) == (how == "full")
    assert config.gradient_checkpointing is True
    assert config.metric_for_best_model == "feasible_primary"


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["phi_1b_lora", "opt_1b_full"])
def test_the_large_configurations_train_as_they_stand_but_for_their_size(name, tmp_path):
    if name.endswith("full"):
        pytest.importorskip("torchao")
    small = {
        "phi_1b_lora": TINY,
        "opt_1b_full": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "vocab_size": 260, "max_position_embeddings": 256},
    }[name]
    train(
        [
            *("--config", str(ROOT / "configs" / f"{name}.yaml"), "--random_weights", "true", "--max_steps", "2"),
            *("--output_dir", str(tmp_path), "--use_cpu", "--architecture_options", json.dumps(small)),
        ]
    )
    assert json.loads((tmp_path / "training_summary.json").read_text())["steps"] == 2
    assert list(tmp_path.rglob("events.out.tfevents.*"))


@pytest.mark.usefixtures("offline")
def test_a_dry_run_tells_the_plan_and_does_nothing(tmp_path, capsys, monkeypatch):
    more = ["--lora_r", "2", "--eval_fraction", "0.34", "--num_train_epochs", "3", "--max_steps", "-1"]
    command = [*RANDOM, *more, "--output_dir", str(tmp_path / "out"), "--gradient_accumulation_steps", "2"]
    assert cli.main(["train", *command, "--dry_run", "true"]) == 0
    output = capsys.readouterr().out
    assert not (tmp_path / "out").exists()

    trained = []
    monkeypatch.setattr("mopo_kernels.cli.train.save_results", lambda trainer, *rest: trained.append(trainer))
    train(command)
    (trainer,) = trained
    batches = [trainer.data_collator([example]) for example in trainer.train_dataset]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    prompts = sum(int(batch["segment_length"][0]) for batch in batches)
    scored = sum(batch["target"].numel() for batch in batches)
    facts = dict(re.split(r" {2,}", line, maxsplit=1) for line in output.splitlines() if re.match(r"\w.* {2,}", line))
    assert facts["data"] == "4 prompts, 12 responses, 12 pairs; held out 2 prompts, 6 responses, 6 pairs"
    assert facts["layout"] == "each prompt once for its responses"
    assert facts["tokens an epoch"].startswith(
        f"{tokens:,} to compute: {prompts:,} of prompts, {scored:,} of responses"
    )
    assert facts["tokens an epoch"].endswith("padding 0 (0.0%)")
    assert facts["steps"].startswith(f"{trainer.state.global_step} in all, 1 an epoch, of 4.0 prompts")
    start = trainer.label_solution.multiplier["second"]
    assert facts["thresholds"] == (
        f"first maximised, second >= 0.3: can be met on the labels; multipliers start at second {start:.3g}; "
        "they stand there"
    )
    held_out = sum(trainer.data_collator([example])["input_ids"].numel() for example in trainer.eval_dataset)
    assert f": {tokens + held_out:,} tokens forward, beside {3 * tokens:,} forward" in facts["reference"]
    numbers = [
        sum(p.numel() for p in ps)
        for ps in ([p for p in trainer.model.parameters() if p.requires_grad], list(trainer.model.parameters()))
    ]
    assert facts["trained"].startswith(f"{numbers[0]:,} of {numbers[1]:,} parameters")
    assert re.search(r"^  total +\d+$", output, re.MULTILINE)


def test_a_dry_run_counts_the_padding_of_rows(files, tmp_path, capsys):
    more = ["--shared_prompts", "never", "--per_device_train_batch_size", "12", "--dry_run", "true"]
    train(arguments(files, *more, "--output_dir", str(tmp_path)))
    output = capsys.readouterr().out
    data = load_preferences(files / "train.jsonl")
    batch = PreferenceCollator(make_tokenizer(), data.objectives)(list(data))
    mask = batch["attention_mask"]
    assert f"tokens an epoch  {mask.numel():,} to compute: " in output
    assert f"padding {int((1 - mask).sum()):,} ({float(1 - mask.float().mean()):.1%})" in output


def test_a_dry_run_counts_the_dual_data_apart(files, tmp_path, capsys):
    more = ["--dual_data", "0.25", "--dual_effective_prompts", "2", "--per_device_train_batch_size", "1"]
    more += ["--num_train_epochs", "1", "--max_steps", "-1", "--output_dir", str(tmp_path)]
    train(arguments(files, *more, "--dry_run"))
    output = capsys.readouterr().out
    assert "9 prompts, " in output
    assert "; 3 prompts, " in output
    assert "pairs steer the multipliers" in output
    assert "9 in all, 9 an epoch" in output
    assert "they stand there" not in output
    train(arguments(files, *more))
    assert json.loads((tmp_path / "training_summary.json").read_text())["steps"] == 9


def test_fixed_multipliers_come_from_the_command_line(files, tmp_path, capsys):
    more = ["--thresholds", "", "--fixed_multipliers", "brief=0.39", "--output_dir", str(tmp_path)]
    train(arguments(files, *more, "--dry_run"))
    assert "none; helpful is maximised, with fixed multipliers brief 0.39" in capsys.readouterr().out
    train(arguments(files, *more))
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert (summary["multiplier"], summary["threshold"], summary["dual"]) == ({"brief": 0.39}, {}, None)
    with pytest.raises(ValueError, match="fixed_multipliers: expected no thresholds"):
        train(arguments(files, "--thresholds", "brief=0.4", *more[2:]))


def test_a_dry_run_names_thresholds_that_the_labels_rule_out(files, tmp_path, capsys):
    assert cli.main(["train", *arguments(files, "--thresholds", "brief=0.99", "--dry_run"), "--output_dir", "x"]) == 0
    assert (
        "brief >= 0.99: on the training labels (estimator pair, dual_max 10): threshold brief >= 0.99 cannot be met"
        in (capsys.readouterr().out)
    )


def test_merged_weights_are_the_model_with_its_adapters(files, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(arguments(files, "--output_dir", str(tmp_path), "--merge_adapters", "true", "--learning_rate", "0.1"))
    tokens = torch.arange(10)[None]
    base = AutoModelForCausalLM.from_pretrained(files / "model")
    with torch.no_grad():
        before = base(tokens).logits
        expected = PeftModel.from_pretrained(base, tmp_path)(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(make_tokenizer())
    assert "LORA adapter of rank 2, alpha 4, merged into the weights" in (tmp_path / "merged" / "README.md").read_text()
