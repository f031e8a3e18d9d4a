"""``load_preferences``: from files, folders, hub data sets and lists to validated ``PreferenceData``."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mopo_kernels.data.converters import CONVERTERS, Converter, Row
from mopo_kernels.data.dataset import PreferenceData, import_datasets, merge_preferences, nothing_usable
from mopo_kernels.data.schema import DataError, PreferenceExample

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "eval": "test",
    "evaluation": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}


def _is_text(path: Path) -> bool:
    return path.name.endswith(_TEXT_SUFFIXES)


def _is_data(path: Path) -> bool:
    return _is_text(path) or path.suffix == ".parquet"


def _read_text(path: Path) -> Iterator[Row]:
    """JSON Lines, plain or gzipped, or one JSON array; read line by line, so that a bad line is named by its number."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
            file.seek(0)
            if first.lstrip().startswith(b"["):
                yield from _table_rows(json.load(file), str(path))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Row(str(path), number, _parsed(line, str(path), number))
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg}", str(path), error.lineno) from None
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"cannot be read: {error}", str(path), number + 1) from error


def _parsed(line: bytes, source: str, number: int) -> Any:
    """The record of a line; a broken line gives a DataError, to be counted like any other bad row."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON: {error.msg} at column {error.colno}", source, number)
    except UnicodeDecodeError as error:
        return DataError(f"not valid UTF-8: {error.reason} at byte {error.start + 1}", source, number)


def _split_of(path: Path, root: Path) -> str | None:
    """The split that a file belongs to by the words in its name, else by those of its folders."""
    for part in reversed(path.relative_to(root).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder that belong to ``split``; which one must be said when there are several."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _is_data(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError("no JSON Lines or parquet file in this folder", str(folder))
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path, folder), []).append(path)
    if split is None:
        if len(by_split) > 1:
            names = ", ".join(sorted(name or "(other files)" for name in by_split))
            raise DataError(f"has several splits ({names}): pass split=", str(folder))
        return files
    wanted = _SPLIT_WORDS.get(split, split)
    if wanted not in by_split:
        if set(by_split) == {None} and wanted == "train":
            return files
        names = ", ".join(sorted(name or "(other files)" for name in by_split))
        raise DataError(f"no split {split!r}, there are: {names}", str(folder))
    return by_split[wanted]


def _table_rows(dataset: Iterable[Any], source: str) -> Iterator[Row]:
    return (Row(source, number, record) for number, record in enumerate(dataset, 1))


def _from_datasets(path: str, label: str, split: str | None, **options: Any) -> Iterator[Row]:
    """Through ``datasets.load_dataset``: a hub name, or a folder with configurations."""
    datasets = import_datasets()
    dataset = datasets.load_dataset(path, split=split, **{k: v for k, v in options.items() if v is not None})
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise DataError(f"has several splits ({', '.join(dataset)}): pass split=", label)
        (dataset,) = dataset.values()
    return _table_rows(dataset, label)


def _open_rows(
    source: Any, split: str | None, name: str | None, data_dir: str | None, revision: str | None
) -> tuple[str, Iterator[Row]]:
    """(what the source is called, its rows)."""
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Mapping):
            if split not in source:
                raise DataError(f"expected split= one of {', '.join(map(str, source))}, got {split!r}")
            source = source[split]
        if not isinstance(source, Iterable):
            raise TypeError(f"path_or_dataset: expected a path, a name, a Dataset or rows, got {type(source).__name__}")
        return "rows", _table_rows(source, "rows")
    path = Path(source)
    if path.is_dir() and name is None:
        path = path / data_dir if data_dir else path
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return str(path), _table_rows(import_datasets().load_from_disk(str(path)), str(path))
        files = _folder_files(path, split)
    elif path.is_file():
        if not _is_data(path):
            raise DataError(f"expected {', '.join(_TEXT_SUFFIXES)} or .parquet", str(path))
        files = [path]
    elif path.is_dir() or (_HUB_NAME.fullmatch(str(source)) and not _is_data(path)):
        label = "/".join(part for part in (str(source), name, data_dir) if part)
        return label, _from_datasets(str(source), label, split, name=name, data_dir=data_dir, revision=revision)
    else:
        raise DataError("no such file or folder", str(source))
    return str(path), itertools.chain.from_iterable(map(_file_rows, files))


def _file_rows(path: Path) -> Iterator[Row]:
    if _is_text(path):
        return _read_text(path)
    datasets = import_datasets()
    try:
        dataset = datasets.Dataset.from_parquet(str(path))
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot be read: {error.__cause__ or error}", str(path)) from error
    return _table_rows(dataset, str(path))


def _detect(record: Mapping[str, Any], source: str) -> type[Converter]:
    for converter in CONVERTERS.values():
        if converter.matches(record):
            return converter
    raise DataError(
        f"cannot tell the format from the columns {', '.join(map(str, record))}: pass format= one of "
        f"{', '.join(CONVERTERS)}",
        source,
    )


def _build_converter(kind: type[Converter], options: Mapping[str, Any], **common: Any) -> Converter:
    known = {item.name for item in dataclasses.fields(kind)} - {item.name for item in dataclasses.fields(Converter)}
    unknown = sorted(set(options) - known)
    if unknown:
        has = f"has {', '.join(sorted(known))}" if known else "has no options"
        raise ValueError(f"{unknown[0]}: not an option of format {kind.name!r}, which {has}")
    return kind(**common, **options)


def load_preferences(
    path_or_dataset: Any,
    *,
    format: str = "auto",
    objectives: Sequence[str] | None = None,
    split: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    max_prompt_chars: int | None = None,
    max_response_chars: int | None = None,
    limit: int | None = None,
    group: bool = False,
    progress: Callable[[], object] | None = None,
    **format_options: Any,
) -> PreferenceData:
    """Load pairwise preferences from what there is, validate every row, and report the rows left out.

    Args:
        path_or_dataset: a JSON Lines (also gzipped) or parquet file, a folder of them, a folder that
            ``datasets.save_to_disk`` wrote, the name of a data set on the hub, a ``datasets.Dataset``, or a list of
            dicts. A dict ``{objective: any of these}`` loads single-objective sets (hh-rlhf, TRL) and merges them by
            prompt (``merge_preferences``).
        format: "canonical", "pku-saferlhf", "helpsteer" (1 and 2), "ultrafeedback", "summarize-from-feedback",
            "hh-rlhf", "trl", or "auto": by the columns of the first row.
        objectives: the objectives and their order. A format with a fixed list of them gives only these; in the
            canonical format any other name is an error. Default: all, in the order of their first appearance.
        split: which split of a folder or a hub data set; needed when there are several.
        on_error: "raise" stops at the first bad row; "skip" leaves it out and lists it in ``.skipped``.
        name: configuration of a hub data set (or of a folder with a data set card).
        data_dir: sub-folder, such as "harmless-base".
        revision: of a hub data set.
        max_prompt_chars: a longer prompt is a bad row.
        max_response_chars: a longer response is a bad row.
        limit: read this many rows at most.
        group: join the examples that share a prompt.
        progress: called once per row read.
        **format_options: ``signs`` (helpsteer), ``objective`` (hh-rlhf, trl, summarize-from-feedback),
            ``conversational`` (hh-rlhf), ``template`` (summarize-from-feedback).

    Returns:
        ``PreferenceData``, which works as ``train_dataset`` of ``transformers.Trainer``.

    Raises:
        DataError: a bad row (file, line and field in the message), or no usable row.
        ValueError: an unknown format, option or objective.
        ImportError: the ``datasets`` library is missing.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    if format != "auto" and format not in CONVERTERS:
        raise ValueError(f"format: expected auto, {', '.join(CONVERTERS)}, got {format!r}")
    datasets = import_datasets()
    settings: dict[str, Any] = {
        "format": format,
        "split": split,
        "on_error": on_error,
        "name": name,
        "data_dir": data_dir,
        "revision": revision,
        "max_prompt_chars": max_prompt_chars,
        "max_response_chars": max_response_chars,
        "limit": limit,
        "progress": progress,
    }
    if isinstance(path_or_dataset, Mapping) and not isinstance(path_or_dataset, datasets.DatasetDict):
        if objectives is not None and set(objectives) != set(path_or_dataset):
            raise ValueError(f"objectives: expected the keys {sorted(path_or_dataset)}, got {sorted(objectives)}")
        parts = [
            load_preferences(path_or_dataset[key], objectives=[key], **settings, **format_options)
            for key in objectives or path_or_dataset
        ]
        return merge_preferences(parts)

    skipped: list[DataError] = []

    def reject(error: DataError) -> None:
        if on_error == "raise":
            raise error
        skipped.append(error)

    def readable(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if progress is not None:
                progress()
            if isinstance(row.record, DataError):
                reject(row.record)
            elif not isinstance(row.record, Mapping):
                reject(DataError(f"expected an object, got {type(row.record).__name__}", row.source, row.line))
            else:
                yield row

    origin, source_rows = _open_rows(path_or_dataset, split, name, data_dir, revision)
    rows = readable(itertools.islice(source_rows, limit))
    first = next(rows, None)
    if first is None:
        raise nothing_usable(skipped, origin)
    kind = _detect(first.record, origin) if format == "auto" else CONVERTERS[format]
    converter = _build_converter(
        kind, format_options, objectives=objectives, origin=origin, max_response_chars=max_response_chars
    )
    examples = []
    for row in converter.convert(itertools.chain([first], rows), reject):
        try:
            examples.append(
                PreferenceExample.from_dict(
                    row.record,
                    objectives=objectives,
                    max_prompt_chars=max_prompt_chars,
                    max_response_chars=max_response_chars,
                )
            )
        except DataError as error:
            reject(error.at(row.source, row.line, row.fields))
    if objectives is None and converter.available:
        # The schema's own order, not that in which N/A ratings let the names appear.
        objectives = [name for name in converter.available if _labelled(examples, name)]
    data = PreferenceData.from_examples(examples, objectives, skipped)
    return data.group_by_prompt() if group else data


def _labelled(examples: Iterable[PreferenceExample], objective: str) -> bool:
    return any(pair.preference.get(objective) is not None for example in examples for pair in example.pairs)
