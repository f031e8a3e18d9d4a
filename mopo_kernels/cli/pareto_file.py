"""What `mopo pareto` solves: a finite problem from its file, or the labels of preferences as one."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mopo_kernels.cli.output import count_rows
from mopo_kernels.data import PreferenceData, load_preferences, summarize, win_rates
from mopo_kernels.tabular import NamedProblem, PairLabels, TabularProblem
from mopo_kernels.tabular.named import objective_index

Array = npt.NDArray[np.float64]

DEFAULT_TAU = 0.1  # that of `mopo train`

_ARRAYS = ("win_rate", "preference", "behaviour", "reference", "prompt_weight")
_KEYS = (*_ARRAYS, "objectives", "primary", "thresholds", "tau", "robustness")


def problem_file(file: str) -> dict[str, Any] | None:
    """The fields of a finite problem, None where the file is something for load_preferences."""
    path = Path(file)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: _plain(archive[name]) for name in archive.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file}: not a readable .npz file of plain arrays: {error}") from error
    if path.suffix != ".json" or path.is_dir():
        return None
    text = path.read_bytes()
    if not text.strip():
        raise ValueError(f"{file}: is empty")
    try:
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None  # JSON Lines
        raise ValueError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    # Preferences can be one row, or an array of rows.
    return content if isinstance(content, dict) and "responses" not in content else None


def _plain(array: npt.NDArray[Any]) -> Any:
    """Names and numbers of an archive as JSON would have them."""
    return array if array.dtype.kind != "U" and array.ndim else array.tolist()


def _numbers(name: str, value: Any, dimensions: str) -> Array:
    """Nested lists as an array, null as NaN; ``dimensions`` are its letters."""
    expected = f"{name}: expected nested lists of numbers ({', '.join(dimensions)})"
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{expected}, null where a prompt has fewer responses; got lists of unequal lengths") from None
    if array.ndim != len(dimensions) or array.size == 0:
        raise ValueError(f"{expected}; got shape {array.shape}")
    if array.dtype.kind == "O":
        wrong = next((item for item in array.flat if item is not None and type(item) not in (int, float)), None)
        if wrong is not None:
            raise ValueError(f"{expected}; got {wrong!r}")
    elif array.dtype.kind not in "fiu":
        raise ValueError(f"{expected}; got {array.flat[0].item()!r}")
    return array.astype(np.float64)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number; got {value!r}")
    return float(value)


def read_problem(
    file: str, content: Mapping[str, Any], primary: str | None, tau: float | None, robustness: float | None
) -> NamedProblem:
    """A finite problem from the fields of its file."""
    try:
        return _build_problem(content, primary, tau, robustness)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _build_problem(
    content: Mapping[str, Any], primary: str | None, tau: float | None, robustness: float | None
) -> NamedProblem:
    if unknown := [name for name in content if name not in _KEYS]:
        raise ValueError(f"{unknown[0]}: not a field of a finite problem, which has {', '.join(_KEYS)}")
    if ("win_rate" in content) == ("preference" in content):
        raise ValueError(
            f"expected either win_rate or preference; got {'both' if 'win_rate' in content else 'neither'}"
        )
    letters = {"win_rate": "KXY", "preference": "KXYY", "behaviour": "XY", "reference": "XY", "prompt_weight": "X"}
    arrays = {name: _numbers(name, content[name], letters[name]) for name in _ARRAYS if name in content}
    if "win_rate" in arrays and "behaviour" in arrays:
        raise ValueError("behaviour: expected with preference only; got it with win_rate")
    # A response that nobody has judged is padding.
    rates = arrays["win_rate"] if "win_rate" in arrays else np.nanmax(arrays["preference"], 3, initial=-np.inf)
    available: npt.NDArray[np.bool_] = np.asarray(np.isfinite(rates).any(0), dtype=np.bool_)
    if not available.any(1).all():
        source, empty = ("win_rate" if "win_rate" in arrays else "preference"), int(np.argmin(available.any(1)))
        raise ValueError(f"{source}: expected a number for every prompt; got none for {empty}")
    uniform = available / available.sum(1, keepdims=True)
    arrays.setdefault("reference", uniform)
    if "preference" in arrays:
        arrays.setdefault("behaviour", uniform)
    objectives = _objectives(content.get("objectives"), len(rates))
    name = content.get("primary", objectives[0]) if primary is None else primary
    problem = TabularProblem(
        preference=arrays.get("preference"),
        behaviour=arrays.get("behaviour"),
        reference=arrays["reference"],
        prompt_weight=arrays.get("prompt_weight"),
        win_rate=arrays.get("win_rate"),
        primary=objective_index("primary", name, objectives),
        tau=_number("tau", content.get("tau", DEFAULT_TAU)) if tau is None else tau,
        robustness=_number("robustness", content.get("robustness", 0.0)) if robustness is None else robustness,
    )
    thresholds = content.get("thresholds", {})
    if not isinstance(thresholds, Mapping):
        raise ValueError(f"thresholds: expected an object of objective to number; got {thresholds!r}")
    chosen = {key: _number(f"thresholds.{key}", value) for key, value in thresholds.items()}
    return NamedProblem(problem, objectives).with_thresholds(chosen)


def _objectives(value: Any, count: int) -> tuple[str, ...]:
    if value is None:
        return tuple(f"objective_{k}" for k in range(count))
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"objectives: expected a list of names; got {value!r}")
    if len(value) != count or len(set(value)) != count:
        raise ValueError(f"objectives: expected {count} different names, one for each; got {', '.join(value)}")
    return tuple(value)


def read_preferences(
    file: str,
    format: str | None,
    split: str | None,
    columns: str | None,
    group: bool,
    primary: str | None,
    tau: float | None,
    robustness: float | None,
) -> tuple[NamedProblem, tuple[str, ...]]:
    """The labels of preferences as a finite problem, with the win rates that `mopo train` starts from; and what the
    user should know of them."""
    with count_rows("reading") as advance:
        data = load_preferences(
            file, format=format or "auto", split=split, columns=columns, group=group, progress=advance
        )
    rates = win_rates(data)
    problem = TabularProblem(
        win_rate=rates.win_rate,
        reference=rates.reference,
        prompt_weight=rates.prompt_weight,
        tau=DEFAULT_TAU if tau is None else tau,
        primary=0 if primary is None else objective_index("--primary", primary, data.objectives),
        robustness=robustness or 0.0,
    )
    named = NamedProblem(problem, data.objectives, labels=_labels(data, problem.support))
    return named, summarize(data).messages


def _labels(data: PreferenceData, support: npt.NDArray[np.bool_]) -> PairLabels:
    number = np.cumsum(support).reshape(support.shape) - 1
    pairs, preference, weight = [], [], []
    # The columns as they are stored: a second validation of every row would cost more than the rest.
    for x, row in enumerate(data.dataset.select_columns(["pairs", "weight"])):
        for pair in row["pairs"]:
            pairs.append((number[x, pair["i"]], number[x, pair["j"]]))
            preference.append([pair["preference"][name] for name in data.objectives])
            weight.append(row["weight"])
    return PairLabels(
        np.array(pairs, dtype=np.int64),
        np.array(preference, dtype=np.float64),
        np.array(weight, dtype=np.float64),
    )
