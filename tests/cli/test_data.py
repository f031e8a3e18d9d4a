"""mopo data: exit codes, one clear line per error, and a conversion that loads again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mopo_kernels.cli import data as data_cli
from mopo_kernels.cli.data import data_app
from mopo_kernels.data import load_preferences


def mopo_data(*arguments: object) -> Result:
    return CliRunner().invoke(data_app, [str(argument) for argument in arguments])


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def canonical(prompt: str = "p", **labels: float) -> dict[str, Any]:
    return {"prompt": prompt, "responses": ["a", "b"], "pairs": [{"i": 0, "j": 1, "preference": labels or {"a": 1.0}}]}


BAD = canonical() | {"responses": ["a", " "]}


def trl(chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected}


def steer(response: str, verbosity: int) -> dict[str, Any]:
    ratings = {"helpfulness": 4, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": verbosity}
    return {"prompt": "p", "response": response} | ratings


def test_validate_passes_good_data(tmp_path: Path) -> None:
    result = mopo_data("validate", write(tmp_path / "d.jsonl", [canonical(a=1.0, b=0.0), canonical()]))
    assert result.exit_code == 0
    assert result.stdout == "2 good examples, 0 bad rows; objectives: a, b\n"


def test_validate_lists_bad_rows_by_file_line_and_field_and_exits_1(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [canonical(), BAD, canonical(a=2.0)])
    result = mopo_data("validate", path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{path}:2: responses[1]: is empty",
        f"{path}:3: pairs[0].preference.a: expected a number in [0, 1]; got 2.0",
        "1 good examples, 2 bad rows; objectives: a",
    ]


def test_validate_says_how_many_bad_rows_it_does_not_show(tmp_path: Path) -> None:
    result = mopo_data("validate", write(tmp_path / "d.jsonl", [canonical(), *[BAD] * 5]), "--shown", 2)
    assert result.stdout.splitlines()[2] == "... and 3 more"


def test_data_without_a_good_row_exits_1_and_lists_them(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [BAD, BAD])
    result = mopo_data("validate", path)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"{path}:{line}: responses[1]: is empty" for line in (1, 2)]
    assert result.stderr == "mopo: error: no usable row, 2 bad ones\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["validate", "missing.jsonl"], "missing.jsonl: no such file or folder"),
        (["validate", "{data}", "--format", "csv"], "format: expected auto, canonical"),
        (["validate", "{data}", "--negative", "verbosity"], "signs: not an option of format 'canonical'"),
        (["validate", "{data}", "{data}"], "SOURCES: expected objective=path for each"),
        (["validate", "a={data}", "a={data}"], "SOURCES: expected every objective once; got 'a' twice"),
        (["convert", "{data}", "--output", "out.csv"], "--output: expected a name ending in .jsonl or .parquet"),
        (
            ["convert", "{data}", "--output", "{dir}/o.jsonl", "--on_error", "ignore"],
            "--on_error: expected raise or skip",
        ),
        (["convert", "{bad}", "--output", "{dir}/o.jsonl"], "responses[1]: is empty"),
        (["convert", "{data}", "--output", "{data}/o.jsonl"], "File exists"),
        (["report", "{data}", "--objectives", "x,y"], "unknown objective 'a', expected one of x, y"),
        (["report", "{data}", "--output", "{dir}"], "--output: expected a file to write; got the folder"),
        (["report", "{data}", "--output", "{data}/r.json"], "--output: cannot make the folder"),
    ],
)
def test_bad_input_exits_2_with_one_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    data, bad = write(tmp_path / "d.jsonl", [canonical()]), write(tmp_path / "bad.jsonl", [canonical(), BAD])
    extra = ["--on_error", "raise"] if arguments[0] == "report" else []
    result = mopo_data(*(item.format(data=data, bad=bad, dir=tmp_path) for item in arguments), *extra)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert result.stderr.startswith("mopo: error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_a_missing_package_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    result = mopo_data("validate", write(tmp_path / "d.jsonl", [canonical()]))
    assert result.exit_code == 1
    assert "mopo-kernels[train]" in result.stderr


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_conversion_loads_to_the_same_examples(tmp_path: Path, suffix: str) -> None:
    source, target = write(tmp_path / "steer.jsonl", [steer("one", 1), steer("two", 3)]), tmp_path / f"out{suffix}"
    result = mopo_data(
        "convert", source, "--output", target, "--objectives", "helpfulness,verbosity", "--negative", "verbosity"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"wrote 1 examples to {target}, left out 0 bad rows")
    data = load_preferences(target)
    assert data.objectives == ("helpfulness", "verbosity")
    assert data[0].pairs[0].preference == {"helpfulness": 0.5, "verbosity": 1.0}
    direct = load_preferences(source, objectives=["helpfulness", "verbosity"], signs={"verbosity": -1})
    assert list(data) == list(direct)


def test_convert_skips_when_asked_and_lists_what_it_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [canonical(), BAD])
    result = mopo_data("convert", path, "--output", tmp_path / "o.jsonl", "--on_error", "skip")
    assert result.exit_code == 0
    assert f"{path}:2: responses[1]: is empty" in result.stderr
    assert "wrote 1 examples" in result.stdout


def test_convert_merges_named_sources(tmp_path: Path) -> None:
    first, second = write(tmp_path / "h.jsonl", [trl("x", "y")]), write(tmp_path / "b.jsonl", [trl("y", "x")])
    result = mopo_data("convert", f"helpful={first}", f"brief={second}", "--output", tmp_path / "o.jsonl")
    assert result.exit_code == 0, result.stderr
    (example,) = load_preferences(tmp_path / "o.jsonl")
    assert example.pairs[0].preference == {"helpful": 1.0, "brief": 0.0}


def test_transcripts_can_stay_strings(tmp_path: Path) -> None:
    start = "\n\nHuman: Tea?\n\nAssistant:"
    path = write(tmp_path / "helpful.jsonl", [{"chosen": f"{start} Yes.", "rejected": f"{start} No."}])
    for flag, prompt in (("--transcript", start), ("--conversational", [{"role": "user", "content": "Tea?"}])):
        assert mopo_data("convert", path, "--output", tmp_path / "o.jsonl", flag).exit_code == 0
        assert load_preferences(tmp_path / "o.jsonl")[0].prompt == prompt


def test_report_prints_tables_and_writes_json(tmp_path: Path) -> None:
    rows = [canonical("p", detail=1.0, plain=0.0), canonical("q", detail=1.0, plain=1.0), BAD]
    result = mopo_data("report", write(tmp_path / "d.jsonl", rows), "--output", tmp_path / "r.json")
    assert result.exit_code == 0, result.stderr
    assert "2 examples, 2 distinct prompts, 4 responses, 2 pairs" in result.stdout
    for text in ("detail", "plain", "Agreement within prompts", "+0.000", "50.0%", "note: 1 bad rows were left out"):
        assert text in result.stdout
    figures = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert figures["agreement"][0] == {
        "first": "detail",
        "second": "plain",
        "pairs": 2,
        "correlation": 0.0,
        "conflict": 0.5,
    }


def test_report_and_conversion_make_the_folders_of_their_files(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [canonical()])
    assert mopo_data("report", data, "--output", tmp_path / "new" / "r.json").exit_code == 0
    assert mopo_data("convert", data, "--output", tmp_path / "other" / "o.jsonl").exit_code == 0
    assert (tmp_path / "new" / "r.json").exists()
    assert (tmp_path / "other" / "o.jsonl").exists()


@pytest.mark.parametrize("command", ["report", "convert"])
def test_a_file_that_cannot_be_written_is_refused_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def never(*sources: Any, **options: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(data_cli, "load_preferences", never)
    (tmp_path / "o.jsonl").mkdir()
    result = mopo_data(command, tmp_path / "d.jsonl", "--output", tmp_path / "o.jsonl")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"expected a file to write; got the folder {tmp_path}" in result.stderr


def test_report_folds_no_line_in_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long = 30 * "objective_"
    result = mopo_data("report", write(tmp_path / "d.jsonl", [canonical(**{long: 1.0, "b": 0.0})]))
    assert any(f" {long} " in line and "100.0%" in line for line in result.stdout.splitlines())


def test_without_a_command_the_help_is_shown() -> None:
    result = mopo_data()
    assert result.exit_code == 0
    assert "validate" in result.stdout


def test_report_tells_when_the_objectives_agree(tmp_path: Path) -> None:
    result = mopo_data("report", write(tmp_path / "d.jsonl", [canonical(a=1.0, b=1.0)]))
    assert "note: objectives agree within prompts" in result.stdout


def test_brackets_in_data_are_printed_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "[bold]d.jsonl", [canonical(**{"[red]": 1.0})])
    assert mopo_data("validate", path).stdout.endswith("objectives: [red]\n")


def test_help_describes_the_commands() -> None:
    result = mopo_data("--help")
    assert result.exit_code == 0
    for command in ("validate", "convert", "report"):
        assert command in result.stdout


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    rows = [{"q": "Sky?", "persona": "Be brief.", "good": "Blue.", "rejected": "Green."}]
    path, target = write(tmp_path / "d.jsonl", rows), tmp_path / "o.jsonl"
    names = "prompt=q,system=persona,chosen=good"
    assert mopo_data("convert", path, "--output", target, "--columns", names).exit_code == 0
    assert load_preferences(target)[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sky?"},
    ]
    result = mopo_data("validate", path, "--columns", f"{names},history=past")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "columns: expected names of columns; got past, in no row" in result.stderr


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [canonical(split)])
    assert mopo_data("validate", tmp_path, "--split", "test").stdout.startswith("1 good examples")
    result = mopo_data("validate", tmp_path)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "has several splits (test, train): pass split=" in result.stderr


HOSTILE = "a[bold red]\x1b[31m\n\r:smile:\u202e[/x]\\"
SHOWN = r"a[bold red]\x1b[31m\n\r:smile:\u202e[/x]" + "\\"


@pytest.mark.parametrize("command", ["validate", "report", "convert"])
def test_names_and_prompts_are_shown_as_they_are_in_one_line(tmp_path: Path, command: str) -> None:
    rows = [canonical(**{HOSTILE: 1.0, "b": 0.0}), canonical() | {HOSTILE: "x"}, canonical(**{HOSTILE: 2.0})]
    options = [] if command != "convert" else ["--output", tmp_path / "o.jsonl", "--on_error", "skip"]
    result = mopo_data(command, write(tmp_path / "d.jsonl", rows), *options)
    assert SHOWN in result.stdout
    text = result.stdout + result.stderr
    assert not any(mark in text for mark in ("\x1b", "\r", "\u202e", "😄"))
    lines = [line for line in text.splitlines() if "[bold red]" in line]
    assert all("[/x]" in line for line in lines)


@pytest.mark.parametrize("option", ["--columns", "--objectives", "--format", "--split"])
def test_errors_show_what_they_quote_in_one_line(tmp_path: Path, option: str) -> None:
    result = mopo_data("validate", write(tmp_path / "d.jsonl", [canonical()]), option, f"prompt={HOSTILE}")
    assert result.exit_code in (1, 2)
    assert result.stderr.count("\n") == 1
    assert not any(mark in result.stderr for mark in ("\x1b", "\r", "\u202e", "😄"))


@pytest.mark.parametrize("option", ["--columns", "--split", "--name", "--data_dir", "--format"])
def test_options_of_data_are_refused_where_a_policy_answers_prompts(tmp_path: Path, option: str) -> None:
    (tmp_path / "judges.py").write_text("JUDGES = {'k': lambda prompt, response: 0}", encoding="utf-8")
    judges = ["--judges", f"{tmp_path / 'judges.py'}:JUDGES", "--output", tmp_path / "o.jsonl", "--policy", "none"]
    result = mopo_data("label", write(tmp_path / "p.jsonl", [{"prompt": "p"}]), *judges, option, "trl")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert f"{option}: expected it without --policy only" in result.stderr


def test_the_log_of_unused_columns_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_preferences([canonical() | {HOSTILE: "x"}])
    assert caplog.messages == [f"rows: columns that are not used (rows that have them): {SHOWN} (1)"]
