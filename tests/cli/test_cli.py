"""The command line: exit codes, one line an error, and `mopo eval` and `mopo doctor` from end to end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

import mopo_kernels.backends
import mopo_kernels.cli.doctor as doctor_module
from mopo_kernels import cli
from mopo_kernels.backends import BackendUnavailableError, cpp
from mopo_kernels.files import prepare_file

JUDGES = """
JUDGES = {
    "length": lambda prompt, response: len(response.split()),
    "variety [of words]": lambda prompt, response: len(set(response.split())),
}
"""
PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPO_TRACEBACK", "")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama, a LoRA adapter on it, judges and prompts."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("workspace")
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{index}" for index in range(61)]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).save_pretrained(
        folder / "adapter"
    )
    (folder / "judges.py").write_text(JUDGES, encoding="utf-8")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    return folder


def eval_arguments(workspace: Path, *more: str, policy: str = "adapter") -> list[str]:
    return [
        *("eval", "--policy", str(workspace / policy), "--prompts", str(workspace / "prompts.jsonl")),
        *("--judges", f"{workspace / 'judges.py'}:JUDGES", "--samples", "3", "--max_new_tokens", "5"),
        *("--device", "cpu", *more),
    ]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, which must be one line, on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


# Errors and exit codes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "--nonsense"),
        (["eval"], "--policy"),
        (["eval", "--policy", "p", "--prompts", "q", "--judges", "j:k", "--samples", "0"], "--samples"),
        (["eval", "--policy", "p", "--prompts", "q", "--judges", "j:k", "--samples", "many"], "--samples"),
        (["eval", "--policy", "p", "--prompts", "q", "--judges", "nowhere"], "judges: expected"),
        (["doctor", "extra"], "extra"),
    ],
)
def test_bad_arguments_exit_2_with_one_line_that_names_them(capsys, argv, words):
    assert cli.main(argv) == 2
    line = error_line(capsys)
    assert line.startswith("mopo: error: ")
    assert words in line


@pytest.mark.parametrize(("argv", "command"), [([], "pareto"), (["data"], "validate")])
def test_a_command_of_commands_alone_shows_its_help(capsys, argv, command):
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert "Usage: mopo" in captured.out
    assert command in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--prompts", "absent.jsonl"], "absent.jsonl"),
        (["--threshold", "length"], "--threshold: expected OBJECTIVE=VALUE"),
        (["--threshold", "length=1.5"], "got 'length=1.5'"),
        (["--threshold", "other=0.5"], "got 'other=0.5'"),
        (
            ["--plot", "p.png", "--x", "length", "--y", "heat"],
            "--y: expected one of length, variety [of words]; got heat",
        ),
        (["--plot", "p.png"], "--x: expected one of"),
        (["--output", "folder"], "--output: expected a file to write; got the folder folder"),
        (["--output", "file/report.json"], "--output: cannot make the folder file: File exists"),
        (["--plot", "folder", "--x", "length", "--y", "variety [of words]"], "--plot: expected a file to write"),
        (["--policy", "nowhere/at/all"], "--baseline: expected a model"),
        (["--policy", "nowhere/at/all", "--baseline", "b"], "got nowhere/at/all, which does not exist"),
        (["--top_p", "0"], "top_p: expected a number in (0, 1]; got 0.0"),
        (["--confidence", "1"], "confidence: expected a number in (0, 1); got 1.0"),
    ],
)
def test_bad_values_of_eval_exit_2_with_one_line_and_before_sampling(
    workspace, capsys, monkeypatch, tmp_path, more, words
):
    def never(*args, **options):
        raise AssertionError("sampled")

    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "generate", never)
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    assert cli.main(eval_arguments(workspace, *more)) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]  # loading weights shows a bar of its own
    assert line.startswith("mopo: error: ")
    assert words in line
    assert "Traceback" not in captured.err


def test_eval_tells_two_policies_of_the_same_name_apart(workspace, capsys):
    assert cli.main(eval_arguments(workspace, "--baseline", str(workspace / "model"), policy="model")) == 0
    assert "model (policy) over model (baseline)" in capsys.readouterr().out


def test_a_folder_without_a_model_exits_2(workspace, capsys, tmp_path):
    assert cli.main(eval_arguments(workspace, "--policy", str(tmp_path), "--baseline", str(workspace / "model"))) == 2
    assert "model: expected a model folder" in error_line(capsys)


def fake_train(monkeypatch: pytest.MonkeyPatch, action) -> None:
    module: Any = ModuleType("mopo_kernels.cli.train")
    module.train = action
    monkeypatch.setitem(sys.modules, "mopo_kernels.cli.train", module)


def raising(error: BaseException):
    def action(argv: list[str]) -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ValueError("tau: expected a positive number;\n  got -1"),
            2,
            "mopo: error: tau: expected a positive number; got -1",
        ),
        (FileNotFoundError(2, "No such file", "c.yaml"), 2, "mopo: error: [Errno 2] No such file: 'c.yaml'"),
        (
            BackendUnavailableError("backend 'cuda' is not available: no GPU"),
            2,
            "mopo: error: backend 'cuda' is not available: no GPU",
        ),
        (KeyboardInterrupt(), 130, "mopo: interrupted"),
        (typer.Abort(), 130, "mopo: interrupted"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            1,
            "mopo: error: peft is not installed: pip install 'mopo-kernels[train]'",
        ),
        (ImportError("a broken library"), 1, "mopo: error: a broken library (MOPO_TRACEBACK=1 shows where)"),
    ],
)
def test_what_a_command_raises_becomes_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    fake_train(monkeypatch, raising(error))
    assert cli.main(["train"]) == code
    assert error_line(capsys) == line


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    fake_train(monkeypatch, raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train"])


def test_debug_and_the_environment_variable_show_the_traceback(monkeypatch):
    fake_train(monkeypatch, raising(ValueError("a bad value")))
    with pytest.raises(ValueError, match="a bad value"):
        cli.main(["--debug", "train"])
    monkeypatch.setenv("MOPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="a bad value"):
        cli.main(["train"])
    monkeypatch.setenv("MOPO_TRACEBACK", "0")
    assert cli.main(["train"]) == 2


def test_a_file_without_permission_is_refused_beforehand(monkeypatch, tmp_path):
    asked = []
    # Whoever runs as root has every permission.
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(path) or path != tmp_path / "kept.json")
    prepare_file("--output", tmp_path / "new" / "report.json")
    (tmp_path / "kept.json").touch()
    with pytest.raises(ValueError, match=r"^--output: no permission to write .*kept\.json$"):
        prepare_file("--output", tmp_path / "kept.json")
    assert asked == [tmp_path / "new", tmp_path / "kept.json"]
    assert list((tmp_path / "new").iterdir()) == []


def test_ctrl_c_while_packages_are_imported_is_one_line():
    """In a fresh process in which Ctrl-C comes at the import of the first package of the command line's own."""
    script = "import sys\nfrom mopo_kernels.cli import main\n"
    script += "class Interrupted:\n    def find_spec(self, name, path=None, target=None):\n"
    script += "        if name == 'typer': raise KeyboardInterrupt\n"
    script += "sys.meta_path.insert(0, Interrupted())\nassert 'typer' not in sys.modules\nsys.exit(main(['doctor']))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "mopo: interrupted\n")


# Sub-commands


def test_train_gets_its_arguments_as_they_were_typed(monkeypatch):
    seen: list[list[str]] = []
    fake_train(monkeypatch, seen.append)
    argv = ["--help", "--config", "c.yaml", "--tau", "0.1", "-x", "word", "--", "--debug", "--version", "--lr=3e-4"]
    assert cli.main(["train", *argv]) == 0
    assert seen == [argv]


def test_data_runs_the_data_application_and_passes_its_exit_code_on(monkeypatch, capsys):
    data_app = typer.Typer()
    seen = []

    @data_app.command()
    def validate(path: str, strict: bool = False) -> None:
        seen.append((path, strict))
        raise typer.Exit(3 if strict else 0)

    @data_app.command()
    def report() -> None:
        raise ValueError("rows.jsonl:3: bad row")

    module: Any = ModuleType("mopo_kernels.cli.data")
    module.data_app = data_app
    monkeypatch.setitem(sys.modules, "mopo_kernels.cli.data", module)
    assert cli.main(["data", "validate", "rows.jsonl"]) == 0
    assert cli.main(["data", "validate", "rows.jsonl", "--strict"]) == 3
    assert seen == [("rows.jsonl", False), ("rows.jsonl", True)]
    assert cli.main(["data", "report"]) == 2
    assert error_line(capsys) == "mopo: error: rows.jsonl:3: bad row"
    assert cli.main(["data", "--help"]) == 0
    assert "validate" in capsys.readouterr().out


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mopo {mopo_kernels.__version__}\n"
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {command} " in listed for command in ("train", "data", "eval", "doctor"))


# mopo eval


def test_eval_reports_win_rates_thresholds_and_settings_and_repeats_exactly(workspace, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "new" / "report.json"
    more = ["--threshold", "length=0.01", "--threshold", "variety [of words]=0.99", "--output", str(out)]
    assert cli.main(eval_arguments(workspace, *more)) == 0
    printed = capsys.readouterr().out
    first = json.loads(out.read_text(encoding="utf-8"))
    rate = first["win_rates"]["length"]
    assert f"{rate['mean']:.3f}" in printed
    assert "held" in printed
    assert "missed" in printed
    assert "variety [of words]" in " ".join(printed.split())  # not taken for markup
    assert (rate["prompts"], rate["samples"]) == (4, 12)
    assert [sample["prompt"] for sample in first["samples"]] == PROMPTS
    assert first["settings"]["thresholds"] == {"length": 0.01, "variety [of words]": 0.99}
    assert first["versions"]["torch"] == metadata.version("torch")
    assert cli.main(eval_arguments(workspace, *more)) == 0
    assert json.loads(out.read_text(encoding="utf-8")) == first
    assert cli.main(eval_arguments(workspace, *more, "--seed", "1")) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["samples"] != first["samples"]


def test_eval_of_an_adapter_gives_the_same_report_however_the_two_policies_are_named(workspace, tmp_path):
    reports = []
    for index, names in enumerate(
        (
            ["--policy", "adapter"],
            ["--policy", "model", "--policy_adapter", "adapter", "--baseline", "model"],
            ["--policy", "model", "--policy_adapter", "adapter"],
        )
    ):
        out = tmp_path / f"{index}.json"
        places = [name if name.startswith("--") else str(workspace / name) for name in names]
        assert cli.main(eval_arguments(workspace, *places, "--output", str(out))) == 0
        reports.append(json.loads(out.read_text(encoding="utf-8"))["samples"])
    assert reports[0] == reports[1] == reports[2]


def test_eval_of_scaled_adapters_is_that_of_the_policies_they_make(workspace, tmp_path):
    """Half an adapter twice over is the adapter; at 0 it is the model; the report says what was put together."""
    shutil.copytree(workspace / "adapter", tmp_path / "copy")
    adapter, copy = str(workspace / "adapter"), str(tmp_path / "copy")
    model = ["--policy", str(workspace / "model"), "--baseline", str(workspace / "model")]
    found = {}
    for name, options in {
        "whole": ["--policy_adapter", adapter],
        "halves": ["--policy_adapter", f"{adapter}=0.5", "--policy_adapter", f"{copy}=0.5"],
        "scaled": ["--policy_adapter", f"{adapter}=0.5", "--policy_scale", "2"],
        "none": ["--policy_adapter", adapter, "--policy_scale", "0"],
        "half": ["--policy_adapter", f"{adapter}=0.5"],
        "both": ["--policy_adapter", adapter, "--baseline_adapter", adapter, "--baseline_scale", "0.5"],
    }.items():
        out = tmp_path / f"{name}.json"
        assert cli.main(eval_arguments(workspace, *model, *options, "--output", str(out))) == 0
        found[name] = json.loads(out.read_text(encoding="utf-8"))
    drawn = {name: [sample["candidate"] for sample in report["samples"]] for name, report in found.items()}
    assert drawn["whole"] == drawn["halves"] == drawn["scaled"] == drawn["both"]
    assert drawn["none"] != drawn["whole"] != drawn["half"]
    against = {name: [sample["baseline"] for sample in report["samples"]] for name, report in found.items()}
    assert against["both"] != against["whole"]
    assert found["halves"]["settings"]["policy_adapter"] == {adapter: 0.5, copy: 0.5}
    assert found["scaled"]["settings"]["policy_scale"] == 2.0


def test_eval_refuses_weights_that_are_no_numbers(workspace, capsys):
    for options, message in (
        (
            ["--policy_adapter", "runs/a=half"],
            "--policy_adapter: expected ADAPTER or ADAPTER=WEIGHT; got 'runs/a=half'",
        ),
        (
            ["--policy_adapter", "runs/a=1", "--policy_adapter", "runs/a"],
            "--policy_adapter: expected every adapter once; got 'runs/a' twice",
        ),
        (["--baseline_scale", "0.5"], "--baseline_scale: expected 1 without --baseline or --baseline_adapter; got 0.5"),
    ):
        assert cli.main(eval_arguments(workspace, *options)) == 2
        assert message in capsys.readouterr().err


def test_eval_limits_the_prompts_and_draws_the_plane(workspace, tmp_path):
    out, picture = tmp_path / "report.json", tmp_path / "plane.png"
    more = ["--limit", "2", "--output", str(out), "--plot", str(picture), "--x", "length", "--y", "variety [of words]"]
    assert cli.main(eval_arguments(workspace, *more)) == 0
    assert len(json.loads(out.read_text(encoding="utf-8"))["samples"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


# mopo doctor


def test_doctor_gives_every_backend_and_the_reason_one_is_missing(monkeypatch, capsys):
    found = {"naive": None, "torch": None, "cpp": "no compiler was found", "triton": "no CUDA device"}
    monkeypatch.setattr(mopo_kernels.backends, "availability", lambda: found)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines if line.startswith("backend")}
    assert rows == {
        "backend naive": "available",
        "backend torch": "available",
        "backend cpp": "no: no compiler was found",
        "backend triton": "no: no CUDA device",
    }
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"] == found


def test_doctor_names_packages_that_do_not_work_together(monkeypatch, capsys):
    versions = {"transformers": "5.24.0", "peft": "0.21.2"}
    monkeypatch.setattr(doctor_module, "installed_version", versions.get)
    what = "this transformers loads and adds adapters with peft 0.22 or newer only"
    line = f"transformers 5.24.0 with peft 0.21.2: {what}"
    assert doctor_module.incompatible() == [line]
    assert cli.main(["doctor"]) == 0
    (printed,) = [printed for printed in capsys.readouterr().out.splitlines() if what in printed]
    assert printed.split(maxsplit=1) == ["incompatible", line]
    for name, version in (("peft", "0.22.0"), ("transformers", "5.23.0"), ("peft", None)):
        with monkeypatch.context() as patch:
            patch.setitem(versions, name, version)
            assert doctor_module.incompatible() == []


def test_doctor_folds_no_line_in_a_pipe(monkeypatch, capsys):
    reason = "no compiler was found: " + 40 * "a long reason "
    monkeypatch.setattr(mopo_kernels.backends, "availability", lambda: {"torch": None, "cpp": reason.strip()})
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("backend cpp") and line.endswith(reason.strip()) for line in lines)
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("reason", "native", "said"),
    [
        (None, True, "in use by backend cpp (avx512_bf16)"),
        (None, False, "no: no avx512_bf16 here, or torch was told not to use AVX512: bf16 is multiplied in fp32"),
        ("not built", None, "no: only backend cpp has them, and it is not available"),
    ],
    ids=["native", "not_native", "no_cpp"],
)
def test_doctor_says_whether_bf16_is_multiplied_natively(monkeypatch, capsys, reason, native, said):
    monkeypatch.setattr(mopo_kernels.backends, "availability", lambda: {"torch": None, "cpp": reason})
    monkeypatch.setattr(cpp, "has_native_products", lambda dtype: native)
    assert cli.main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("bf16 products"))
    assert line.removeprefix("bf16 products").strip() == said
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cpu"]["bf16_products"]["reason"]
    assert said.endswith(found or "(avx512_bf16)")


def test_every_extra_that_doctor_names_is_one_of_the_package():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = pyproject.split("[project.optional-dependencies]")[1].split("[project.scripts]")[0]
    for package, extra in doctor_module.OPTIONAL_PACKAGES.items():
        required = extras.split(f"\n{extra} = [")[1].split("]\n")[0]
        assert f'"{package}>=' in required


def test_doctor_says_in_one_line_that_there_is_no_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("compiler"))
    assert line.split(None, 1)[1].strip() == (
        "no: c++ or g++ or clang++ not found on PATH: the C++ backend can't be built"
    )


def test_doctor_asks_the_compiler_that_CXX_names_and_says_when_it_does_not_run(monkeypatch, tmp_path):
    tool = tmp_path / "mycxx"
    tool.write_text("#!/bin/sh\necho 'mycxx 9.8.7'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CXX", f"{tool} -O2")
    assert doctor_module.collect()["tools"]["compiler"] == {
        "path": str(tool),
        "version": "mycxx 9.8.7",
        "reason": None,
    }
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert "does not run" in doctor_module.collect()["tools"]["compiler"]["reason"]


def test_doctor_names_the_extra_of_a_package_that_is_missing(monkeypatch, capsys):
    installed = doctor_module.installed_version
    monkeypatch.setattr(doctor_module, "installed_version", lambda name: None if name == "peft" else installed(name))
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("peft"))
    assert line.split(None, 1)[1].strip() == "no: not installed: pip install 'mopo-kernels[train]'"


def test_doctor_runs_where_the_training_extra_is_not_installed():
    """In a fresh process in which importing any package of the extras fails, as it does where none is installed."""
    hide = "import sys\nfor name in ('transformers', 'peft', 'accelerate', 'datasets', 'matplotlib', 'triton'):\n"
    hide += "    sys.modules[name] = None\n"
    script = hide + "from mopo_kernels.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, "doctor"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "backend torch" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_module_form_exits_with_the_code_of_main():
    command = [sys.executable, "-m", "mopo_kernels.cli", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mopo: error: No such command 'nonsense'.\n"


def test_options_have_underscores_and_results_are_written_to_output():
    from mopo_kernels.cli.app import app
    from mopo_kernels.cli.data import data_app

    options = {
        name: [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
        for group in (app, data_app)
        for name, command in typer.main.get_group(group).commands.items()
    }
    assert not [(name, option) for name, names in options.items() for option in names if "-" in option.lstrip("-")]
    assert {name for name, names in options.items() if "--output" in names} == {
        *("pareto", "eval", "certify"),
        *("convert", "report", "label"),
    }
