"""README.md and docs: code blocks and commands as printed, tables from results, links and names that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from trainer_samples import make_model, make_tokenizer

from bench import tables
from mopo_kernels.cli import main

ROOT = Path(__file__).parents[2]
# Pages whose Python blocks and `mopo` commands are run, in the order they are printed.
GUIDES = (
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/guides/*.md")),
    "docs/quickstart.md",
)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/*/*.md", "studies/*/**/*.md")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A link of Markdown, or a picture of HTML: path, fragment.
LINK = re.compile(r"""(?:\]\(|src=")(?![a-z]+:)([^)"#\s]*)(?:#([^)\s]*))?[)"]""")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the pages assume it: a model of the reader's own, ``pairs.jsonl``, judges and prompts."""
    make_model().save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    (row,) = [text for language, text in blocks("docs/quickstart.md") if language == "json"]
    rows = [json.loads(row) for _ in range(8)]
    for number, item in enumerate(rows):
        item["prompt"] += " " * number + str(number)
        item["pairs"][0]["preference"] = {"helpful": float(number % 2), "harmless": float(number % 3 == 0)}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    judges = [text for language, text in blocks("docs/quickstart.md") if text.startswith("JUDGES")]
    (tmp_path / "judges.py").write_text(judges[0])
    (tmp_path / "prompts.txt").write_text("Name a fruit.\nName a tree.\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page: str) -> tuple[dict[str, Any], list[str]]:
    """Run a page's Python blocks, in one namespace, and its commands.

    Returns:
        The namespace, and the command lines that are not `mopo`'s.
    """
    namespace: dict[str, Any] = {}
    others = []
    for number, (language, text) in enumerate(blocks(page)):
        if language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), namespace)
        elif language == "bash":
            for line in text.replace("\\\n", "").splitlines():
                if line.startswith("mopo "):
                    assert main(shlex.split(line, comments=True)[1:]) == 0, line
                else:
                    others.append(line)
    return namespace, others


@pytest.mark.parametrize("page", [page for page in GUIDES if page not in ("README.md", "docs/quickstart.md")])
def test_a_guides_blocks_run_as_printed(page: str, reader: Path) -> None:
    run_page(page)


def test_the_readmes_blocks_run_as_printed(reader: Path) -> None:
    namespace, _ = run_page("README.md")
    assert namespace["after"].loss.item() == pytest.approx(namespace["before"].item(), rel=1e-5)
    assert namespace["trainer"].state.global_step == 2
    assert (reader / "runs/cli/config.json").is_file()


def test_the_quick_starts_blocks_run_as_printed(reader: Path) -> None:
    namespace, _ = run_page("docs/quickstart.md")
    assert namespace["trainer"].state.global_step == 2
    assert (reader / "runs/first/adapter_config.json").is_file()
    assert (reader / "runs/mine/final").is_dir()


def test_the_readmes_losses_have_the_same_gradients() -> None:
    first, second = (text for language, text in blocks("README.md")[1:3] if language == "python")
    gradients = []
    for loss in ("before", "after.loss"):
        namespace: dict[str, Any] = {}
        exec(first + second + f"{loss}.backward()", namespace)
        gradients.append([namespace[name].grad for name in ("hidden", "weight")])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, page
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))


def test_json_blocks_are_rows_of_the_schema() -> None:
    from mopo_kernels import PreferenceExample

    rows = [text for page in GUIDES for language, text in blocks(page) if language == "json"]
    assert rows
    for row in rows:
        assert PreferenceExample.from_dict(json.loads(row)).responses == ("An apple.", "Go away.")


@pytest.mark.parametrize("page", GUIDES)
def test_names_of_the_package_exist(page: str) -> None:
    import mopo_kernels

    for name in re.findall(r"`([A-Za-z_]+)`", (ROOT / page).read_text(encoding="utf-8")):
        if name.startswith(("linear_", "MOPO", "Linear", "Dual", "mopo_loss", "load_", "Preference", "pack_")):
            assert hasattr(mopo_kernels, name), f"{page} names {name}, which does not exist"


def test_links_lead_somewhere() -> None:
    """A link's file exists, and has the heading that it names."""

    def anchor(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")

    count = 0
    for page in (*PAGES, ROOT / "examples/paper/README.md"):
        for path, fragment in re.findall(LINK, page.read_text(encoding="utf-8")):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page}: {path}"
            if fragment:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert fragment in map(anchor, headings), f"{page}: {path}#{fragment}"
            count += 1
    assert count > 50


def test_every_page_is_in_the_site() -> None:
    """Sphinx says so too, but `make test` does not build the site."""
    listed = set()
    for page in (ROOT / "docs/index.md", ROOT / "docs/studies.md"):
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            entries = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {path for entry in entries for path in (ROOT / "docs").glob(f"{entry}.md")}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert pages - listed == {ROOT / "docs/index.md"}
    included = {
        (page.parent / path).resolve()
        for page in pages
        for path in re.findall(r"^```\{include\} (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {page for page in PAGES if page.is_relative_to(ROOT / "studies")} <= included


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_demos_table_is_of_a_run_under_its_protocol_whose_claims_hold() -> None:
    page = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    file = ROOT / "examples/demo/results/report.json"
    if not file.exists():
        assert "It has not been run in full under this protocol yet" in page
        return
    report = json.loads(file.read_text())
    protocol = json.loads((ROOT / "examples/demo/protocol.json").read_text())
    assert all(report["claims"].values())
    assert report["claims_in_words"] == protocol.pop("claims")
    assert {name: report["settings"][name] for name in protocol} == protocol
    for policy in ("constrained", "unconstrained", "turned_down"):
        for rate in report["win_rates"][policy]["win_rates"].values():
            assert f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in page
    assert report["versions"]["commit"] in page
    seeds_file = ROOT / "examples/demo/results/seeds.json"
    if not seeds_file.exists():
        assert "how often a claim fails by chance was not estimated yet" in page
        return
    seeds = json.loads(seeds_file.read_text())
    assert seeds["protocol"] == report["protocol"]
    assert len(seeds["seeds"]) >= 5


@pytest.mark.parametrize("page", tables.DOCUMENTS)
def test_tables_are_made_from_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.replaced(page, text) == text, "run python -m bench.tables"
    figure = re.search(r"^\|.* (\d)\.\d\d", text, re.MULTILINE)
    assert figure is not None
    changed = text[: figure.start(1)] + str((int(figure[1]) + 1) % 10) + text[figure.end(1) :]
    assert tables.replaced(page, changed) == text


def test_every_command_is_in_the_reference() -> None:
    import typer

    from mopo_kernels.cli.app import app
    from mopo_kernels.cli.data import data_app

    def names(of: typer.Typer) -> set[str]:
        return set(typer.main.get_command(of).commands)  # type: ignore[attr-defined]

    wanted = names(app) - {"data"} | {f"data {name}" for name in names(data_app)}
    page = (ROOT / "docs/reference/command_line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^```\{mopo-command\} (.*)$", page, re.MULTILINE)) == wanted
