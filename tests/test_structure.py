"""How the core is built: imports run one way, each list of options stands where it must, few frames to a kernel."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from samples import Batch, make_batch

import mopo_kernels
from mopo_kernels.backends import tile_backend

PACKAGE = Path(mopo_kernels.__file__).parent
# From what uses to what is used.
FLOORS = ("modules", "functional", "fused", "backends", "naive_grad", "arguments", "checks", "naive", "transfer")
# Other than the core: they use its public functions.
ABOVE: tuple[str, ...] = (
    "cli",
    "data",
    "trainer",
    "tabular",
    "certify",
    "dual",
    "evaluation",
    "labelling",
    "mappings",
    "plots",
)
ABOVE += ("files", "rewards", "text")


def core() -> Iterator[tuple[str, ast.Module]]:
    """The core's modules by their name within the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name.split(".")[0] not in (*ABOVE, "__init__"):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """What a module imports of the package, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "mopo_kernels":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mopo_kernels."):
            yield str(node.module).removeprefix("mopo_kernels.")


def test_no_import_of_the_core_runs_up() -> None:
    for name, tree in core():
        floor = FLOORS.index(name.split(".")[0])
        for other in imported(tree):
            assert FLOORS.index(other.split(".")[0]) >= floor, f"{name} imports {other}"


def test_a_private_name_stays_in_its_package() -> None:
    """Neither another package of the library nor benchmarks, studies, examples or tests import it."""
    root = PACKAGE.parent
    own = {"mopo_kernels", "bench", "studies", *(path.stem for path in (root / "tests" / "helpers").glob("*.py"))}
    seen = 0
    for folder in ("mopo_kernels", "bench", "studies", "examples", "docs", "tests"):
        for path in (root / folder).rglob("*.py"):
            package = ".".join(path.relative_to(root).parent.parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in own:
                    seen += 1
                    names = [*node.module.split("."), *(alias.name for alias in node.names)]
                    private = [name for name in names if name.startswith("_") and not name.endswith("__")]
                    assert not private or node.module.rpartition(".")[0] == package, f"{path} imports {private}"
    assert seen > 1000


# "name: expected ...; got ...": what an older dialect wrote instead.
OTHER_DIALECT = re.compile(r"\bmust (be|have|lie|hold|not)\b|, got\b|\bshould be\b|\bneeds to\b")


def messages(tree: ast.AST) -> Iterator[str]:
    """Texts within errors that are raised, and within what the checks raise by."""
    for node in ast.walk(tree):
        called = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Raise) or called in ("expect", "value", "fail"):
            yield from (
                part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )


def test_errors_are_written_in_one_dialect() -> None:
    assert any(
        OTHER_DIALECT.search(text) for text in messages(ast.parse("raise ValueError(f'tau must be {x}, got 0')"))
    )
    for path in PACKAGE.rglob("*.py"):
        for text in messages(ast.parse(path.read_text(encoding="utf-8"))):
            assert not OTHER_DIALECT.search(text), f"{path.name}: {text}"


def test_no_test_module_is_imported_by_another() -> None:
    """What two of them share stands in tests/helpers."""
    tests = Path(__file__).parent
    modules = {path.stem for path in tests.rglob("test_*.py")}
    helpers = {path.stem for path in (tests / "helpers").glob("*.py")}
    assert not modules & helpers
    seen: set[str] = set()
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not modules & set(names), f"{path} imports {names}"
            seen |= helpers & set(names)
    # All but what is only run as a script.
    assert helpers - seen == {"fault_child"}


def names_of(node: ast.AST) -> set[str]:
    """Parameters of a function, fields of a class, keys of a dictionary, or what a call is given."""
    if isinstance(node, ast.FunctionDef):
        return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    if isinstance(node, ast.ClassDef):
        return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and hasattr(part.target, "id")}
    if isinstance(node, ast.Dict):
        return {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    if isinstance(node, ast.Call):
        given = {getattr(argument, "id", getattr(argument, "attr", None)) for argument in node.args}
        return {name for name in (*given, *(keyword.arg for keyword in node.keywords)) if name}
    return set()


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (
            ("tau", "loss_type", "max_ratio", "estimator"),
            {
                "arguments LossOptions",
                *(f"functional {name}" for name in ("mopo_loss", "linear_mopo_loss")),
                "modules __init__",
                "naive mopo_loss",
            },
        ),
        (
            ("softcap", "logit_scale", "temperature"),
            {
                "arguments LogitTransform",
                *(f"functional {name}" for name in ("linear_logprob", "linear_sequence_logprob", "linear_mopo_loss")),
                "modules __init__",
                *(f"naive {name}" for name in ("head_logits", "linear_logprob")),
            },
        ),
    ],
    ids=["loss", "head"],
)
def test_options_are_listed_by_public_functions_the_bundle_and_the_oracle(
    options: tuple[str, ...], places: set[str]
) -> None:
    found = set()
    for name, tree in core():
        for node in ast.walk(tree):
            if set(options) <= names_of(node) and not (
                isinstance(node, ast.Call) and name in ("naive", "functional", "modules")
            ):
                found.add(f"{name} {getattr(node, 'name', type(node).__name__)}")
    assert found == places


CALLS = {
    "linear_logprob": lambda b: mopo_kernels.linear_logprob(b.hidden, b.weight, b.target, b.bias, backend="torch"),
    "linear_sequence_logprob": lambda b: mopo_kernels.linear_sequence_logprob(
        b.hidden, b.weight, b.target, b.cu_seqlens, b.bias, backend="torch"
    ),
    "linear_mopo_loss": lambda b: mopo_kernels.linear_mopo_loss(
        *b.loss_arguments(), **b.loss_options("regression"), backend="torch"
    ),
}


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias")], ids="+".join)
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_six_frames_in_four_files_from_its_public_name(
    name: str, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = type(tile_backend("torch"))
    launch, found = backend.lse_fwd, []

    def counted(*arguments: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        # The launch itself, which stands in for a kernel's own function.
        files = ["backend"]
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(PACKAGE)):
                files.append(frame.f_code.co_filename)
            frame = frame.f_back
        found.append(files)
        launch(*arguments)

    monkeypatch.setattr(backend, "lse_fwd", counted)
    batch: Batch = make_batch(dtype=torch.float32)
    batch.leaves(*trained)
    CALLS[name](batch)
    assert found
    assert max(len(files) for files in found) <= 6
    assert max(len(set(files)) for files in found) <= 4
