"""Names and texts of others do nothing but stand where they are shown, and files of others run no code."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from trainer_samples import make_model, make_tokenizer, make_trainer

from mopo_kernels import cli
from mopo_kernels.cli import certify as certify_command
from mopo_kernels.cli import eval as eval_command
from mopo_kernels.cli import sweep as sweep_command
from mopo_kernels.cli.output import show
from mopo_kernels.cli.train import load_model, load_tokenizer, parse
from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair
from mopo_kernels.evaluation import compare_responses, load_judges, load_policy, read_sweep
from mopo_kernels.plots import plot_policies
from mopo_kernels.text import markdown, one_line, some
from mopo_kernels.trainer.model_card import add_certificate, model_card
from mopo_kernels.trainer.sweep import load_sweep

ESCAPE, MARKUP, HTML, PATH = "a\x1b[31mb", "[red]x[/] :warning:", "<script>x</script>|y", "../../up"
HOSTILE = [ESCAPE, MARKUP, HTML, PATH, "two\nlines", "| a | b |", "$\\frac$", "`code` *bold* __init__", "\u202eright"]
SHOWN = [one_line(name) for name in HOSTILE]


def test_one_line_escapes_what_is_not_printed_and_nothing_else():
    assert one_line("Grüße, 你好 🙂 [x] | <b>") == "Grüße, 你好 🙂 [x] | <b>"
    assert one_line("a\x1b[2Jb\r\n\tc\x00\u2028\u202e\x7f") == r"a\x1b[2Jb\r\n\tc\x00\u2028\u202e\x7f"
    assert some(["a\n", "b", "c"], shown=2) == r"a\n, b and 1 more"


def test_markdown_shows_a_name_as_it_is():
    assert markdown("my-model_2.1 >= 0.5") == "my-model_2.1 >= 0.5"
    assert markdown("<b>&|[x](y)") == r"&lt;b>&amp;\|\[x\](y)"
    assert markdown("__a__ *b* `c` $d$ ~e~") == r"\_\_a\_\_ \*b\* \`c\` \$d\$ \~e\~"
    assert markdown("# a\n---\n## Certificate") == r"# a\\n---\\n## Certificate"


# ---------------------------------------------------------------------------------------------- cards and reports


def labelled_for(names: list[str]) -> PreferenceData:
    labels = dict.fromkeys(names, 1.0)
    examples = [
        PreferenceExample(f"w{i}", ("w1", "w2 w3"), (PreferencePair(0, 1, labels | {names[0]: i % 2}),))
        for i in range(8)
    ]
    return PreferenceData.from_examples(examples, names)


def table_of(text: str, first: str) -> list[str]:
    """The lines of the Markdown table whose heading begins with ``first``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    return lines[start : start + next(i for i, line in enumerate(lines[start:]) if not line.startswith("|"))]


def test_a_model_card_keeps_hostile_names_in_their_cells(tmp_path):
    names = [name for name in HOSTILE if name.isprintable()]
    model = make_model()
    model.config._name_or_path = f"evil/{ESCAPE}\n---\nlicense: mit\n# {HTML}"
    trainer = make_trainer(
        tmp_path, model, labelled_for(names), primary=names[0], objectives=names, thresholds={names[1]: 0.0}
    )
    card = model_card(trainer)
    rows = table_of(card.text, "objective")
    assert len(rows) == 2 + len(names)
    # Every "|" of a name is escaped: as many cells in each row.
    assert {row.replace("\\|", "").count("|") for row in rows} == {9}
    assert "<script>" not in card.text
    assert "\x1b" not in card.text
    assert card.data.get("base_model") is None
    assert "license" not in card.data.to_dict()
    assert sum(line.startswith("#") for line in card.text.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.isprintable()])
def test_objectives_that_cannot_be_printed_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"^objectives: expected names of printable characters; got '[ -~]+'$"):
        make_trainer(tmp_path, data=labelled_for(["helpful", name]), primary="helpful", thresholds=None)
    (tmp_path / "judges.py").write_text(f"JUDGES = {{{name!r}: lambda prompt, response: 0.0}}\n")
    with pytest.raises(ValueError, match=r"expected names of printable characters; got '[ -~]+'$"):
        load_judges(f"{tmp_path / 'judges.py'}:JUDGES")


def record() -> dict:
    bounds = [
        {"objective": name, "threshold": 0.4, "value": 0.5, "standard_error": 0.1, "lower": 0.45}
        | {"effective_prompts": 40.0, "kept": True}
        for name in HOSTILE
    ]
    return {
        "certified": True,
        "confidence": 0.95,
        "prompts": 40,
        "baseline": HTML + ESCAPE,
        "scale": 1,
        "candidates": [],
        "bounds": bounds,
        "refused": [HTML + "\n## Certificate\nCertified: everything"],
        "weights": None,
        "settings": {"prompts": ESCAPE, "judges": HTML},
        "versions": {"mopo-kernels": "0"},
    }


def test_a_certificate_keeps_hostile_names_in_their_cells_and_writes_no_file_elsewhere(tmp_path):
    elsewhere = tmp_path / "elsewhere.md"
    elsewhere.write_text("# mine\n")
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "README.md").symlink_to(elsewhere)
    for _ in range(2):
        add_certificate(policy, record())
    assert elsewhere.read_text() == "# mine\n"
    text = (policy / "README.md").read_text()
    assert text.count("\n## Certificate\n") == 1
    assert {row.replace("\\|", "").count("|") for row in table_of(text, "objective")} == {7}
    assert "<script>" not in text
    assert "\x1b" not in text


def printed(capsys, *parts) -> str:
    for part in parts:
        show(part)
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.splitlines())
    return text


def test_tables_show_hostile_names_literally_in_one_line_each(capsys):
    text = printed(capsys, certify_command._table(record(), ESCAPE))
    for name in SHOWN:
        assert sum(line.startswith(f" {name} ") for line in text.splitlines()) == 1
    judges = {name: (lambda prompt, response: float(len(response))) for name in HOSTILE}
    found = compare_responses(["p", "q"], [["a"], ["b"]], [["aa"], ["c"]], judges)
    rates = eval_command._table(found, ESCAPE, HTML, dict.fromkeys(HOSTILE, 0.4))
    points = eval_command._sweep_table(dict.fromkeys(HOSTILE, found), ESCAPE, {}, HOSTILE, HOSTILE)
    for table in (rates, points):
        text = printed(capsys, table)
        for name in SHOWN:
            assert sum(line.startswith(f" {name} ") for line in text.splitlines()) == 1
    part = {"eval": {}, "train": dict.fromkeys(HOSTILE, 0.5)}
    point: dict[str, Any] = {
        "status": "trained",
        "satisfaction": part,
        "slack": {"train": {}, "eval": {}},
        "multiplier": {},
    }
    point |= {"threshold": {}, "thresholds": {}, "seconds": 1.0, "peak_memory_mib": 1.0, "kl": {}, "steps": 1}
    report = {"compared": HOSTILE, "primary": HOSTILE[0], "points": [{"name": name, **point} for name in HOSTILE]}
    headings, rows = sweep_command._columns(report, "train")
    text = printed(capsys, sweep_command._table("t", "c", headings, rows))
    for name in SHOWN:
        assert sum(line.startswith(f" {name} ") for line in text.splitlines()) == 1
    lines = sweep_command._markdown(headings, rows).splitlines()
    assert len(lines) == 2 + len(HOSTILE)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert not any("<script>" in line or "\x1b" in line for line in lines)


def test_an_error_is_one_line_whatever_it_quotes(capsys):
    assert cli.main(["train", "--config", f"no{ESCAPE}\nfile"]) == 2
    line = capsys.readouterr().err.removesuffix("\n")
    assert line.isprintable()
    assert line.startswith("mopo: error: config: cannot read no")


def test_a_picture_draws_hostile_names(tmp_path):
    pytest.importorskip("matplotlib")
    names = [name for name in HOSTILE if name.isprintable()]
    values = {name: {"x": 0.5, "$\\frac": 0.5} for name in names}
    plot_policies(
        values, tmp_path / "front.png", x=["x"], y="$\\frac", nondominated=names, scale="win rate", parity=HTML
    )
    assert (tmp_path / "front.png").stat().st_size > 1000


# ----------------------------------------------------------------------------------------------- names as file names


@pytest.mark.parametrize("name", ["../up", "/etc/x", "..", ".hidden", "a/b", "a\\b", "two\nlines", "a\x1b[0m", ""])
def test_a_sweep_makes_no_folder_outside_its_own(name, tmp_path):
    path = tmp_path / "points.yaml"
    path.write_text(json.dumps({name: {"brief": 0.4}}))
    with pytest.raises(ValueError, match="expected a name that can be a folder's"):
        load_sweep(path)
    path.write_text(json.dumps([{name or "brief": 0.4}]))
    (point,) = load_sweep(path)
    assert Path(point.name).name == point.name not in ("", ".", "..")
    assert point.name.isprintable()
    for points in ({"x" * 256: {"brief": 0.4}}, [{"x" * 256: 0.4}]):
        path.write_text(json.dumps(points))
        with pytest.raises(ValueError, match="expected a name of at most 255 bytes"):
            load_sweep(path)


@pytest.mark.parametrize("name", ["../up", "/etc/x", "..", ".", "", "a/b", "a\\b"])
def test_points_that_lead_out_of_a_sweeps_folder_are_refused(name, tmp_path):
    points = [{"name": "fine", "status": "trained"}, {"name": name, "status": "trained"}]
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    with pytest.raises(ValueError, match="expected points named by folders within it"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points[:1]})[:-4])
    with pytest.raises(ValueError, match="expected what mopo train --sweep writes"):
        read_sweep(tmp_path)


# ----------------------------------------------------------------------------------------------------------- code


def test_a_file_beside_a_judge_stands_in_for_no_installed_module(tmp_path, monkeypatch):
    """A folder of downloads has files of any name; the judge imports the library, and what only lies beside it."""
    (tmp_path / "colorsys.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "beside_the_judge.py").write_text("SCORE = 2.0\n")
    (tmp_path / "own_judges.py").write_text(
        "import colorsys\nimport beside_the_judge\n"
        "JUDGES = {'x': lambda prompt, response: beside_the_judge.SCORE + colorsys.rgb_to_hsv(0, 0, 0)[2]}\n"
    )
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    for name in ("colorsys", "beside_the_judge", "own_judges"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = list(sys.path)
    assert load_judges(f"{tmp_path / 'own_judges.py'}:JUDGES")["x"]("", "") == 2.0
    monkeypatch.chdir(tmp_path)
    assert load_judges("own_judges:JUDGES")["x"]("", "") == 2.0
    assert sys.path == path


def test_code_that_a_models_folder_brings_is_not_run(tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n")
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    for file in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / file).read_text())
        settings["auto_map"] = {kind: "code.Anything" for kind in kinds} | {"AutoTokenizer": ["code.Anything", None]}
        settings["model_type"] = "of_its_own"
        (folder / file).write_text(json.dumps(settings))
    arguments = ["--model_name_or_path", str(folder), "--train_file", "x.jsonl", "--output_dir", str(tmp_path)]
    model, _, config = parse(arguments)
    for load in (lambda: load_model(model, config.device), lambda: load_policy(folder, device="cpu")):
        with pytest.raises((ValueError, OSError)):
            load()
    with contextlib.suppress(ValueError):
        load_tokenizer(model)
    assert not ran.exists()


def test_a_template_is_sandboxed():
    tokenizer = make_tokenizer()
    for template in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{% set _ = messages.append(1) %}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(TemplateError):
            tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)


def test_training_data_with_hostile_prompts_trains_and_its_files_are_printable(tmp_path):
    data = [PreferenceExample(f"{name} w1", ("w1", "w2"), (PreferencePair(0, 1, {"x": 1.0}),)) for name in HOSTILE]
    trainer = make_trainer(
        tmp_path, data=PreferenceData.from_examples(data, ["x"]), primary="x", thresholds=None, max_steps=1
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for path in tmp_path.rglob("*.md"):
        assert "\x1b" not in path.read_text()
        assert "<script>" not in path.read_text()
