"""Where rows come from: files, folders with their splits, hub data sets, tables and lists; each row with its place."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import yaml

from mopo_kernels.data.converters import Row
from mopo_kernels.data.dataset import import_datasets
from mopo_kernels.data.schema import DataError, PreferenceExample
from mopo_kernels.text import one_line, some

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
# Forms of rows that are not read.
_OTHER_SUFFIXES = (".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".bz2", ".xz", ".zst", ".zip")
# What the hub's libraries keep beside the rows.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# How the hub names the files of a split, and what else marks a file as one of several.
_SHARD = re.compile(r"([-_.]?(part|shard|chunk)?[-_.]?\d+([-_.]of[-_.]\d+)?)+$", re.IGNORECASE)
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
_BOM = b"\xef\xbb\xbf"


class _Decoder(json.JSONDecoder):
    """JSON whose objects have every key once, and whose integers are of lengths that Python converts.

    ``problem`` is what was wrong with the last value, which was decoded all the same, or None.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_int=self._integer)
        self.problem: DataError | None = None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.problem = self.problem or DataError("is given twice in one object", field=twice)
        return record

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self.problem = self.problem or DataError(f"not usable: an integer of {len(digits)} digits")
            return 0

    def value(self, text: str, start: int = 0) -> tuple[Any, int]:
        """(the value that begins at ``start`` or the DataError instead of it, where it ends).

        Raises:
            DataError: no value, so that its end is unknown.
        """
        self.problem = None
        try:
            value, end = self.raw_decode(text, start)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
            raise DataError(f"not valid JSON: {error.msg} at {where}") from None
        except RecursionError:
            raise DataError("not usable: JSON that is nested too deeply") from None
        return self.problem or value, end


def _placed(value: Any, source: str, line: int) -> Row:
    """A row; a DataError instead of a record, to be counted like any other bad row, is told its place."""
    return Row(source, line, value.at(source, line) if isinstance(value, DataError) else value)


def _line_value(line: bytes, decoder: _Decoder) -> Any:
    """The record of a line, or the DataError instead of it."""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return DataError(f"not valid UTF-8: {error.reason} at byte {error.start + 1}")
    try:
        value, end = decoder.value(text)
    except DataError as error:
        return error
    return value if end == len(text) else DataError(f"not valid JSON: Extra data at column {end + 1}")


def _array_rows(text: str, source: str) -> Iterator[Row]:
    """The elements of a JSON array, decoded one by one; what follows an element without an end is not read."""
    decoder = _Decoder()
    blank = re.compile(r"\s*")

    def after(place: int) -> int:
        match = blank.match(text, place)
        assert match is not None
        return match.end()

    place, number = after(text.index("[") + 1), 0
    ended = text.startswith("]", place)
    while not ended:
        number += 1
        try:
            value, place = decoder.value(text, place)
        except DataError as error:
            yield _placed(error, source, number)
            return
        yield _placed(value, source, number)
        place = after(place)
        ended = text.startswith("]", place)
        if not ended:
            if not text.startswith(",", place):
                yield _placed(DataError("not valid JSON: the array does not end"), source, number + 1)
                return
            place = after(place + 1)
    if after(place + 1) < len(text):
        yield _placed(DataError("not valid JSON: Extra data after the array"), source, number + 1)


def read_text_rows(path: Path) -> Iterator[Row]:
    """JSON Lines, plain or gzipped, or one JSON array; read line by line, so that a bad line is named by its number."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    number, decoder = 0, _Decoder()
    try:
        with opener(path, "rb") as file:
            lines = (line.removeprefix(_BOM) for line in file if line.removeprefix(_BOM).strip())
            first, second = next(lines, b""), next(lines, None)
            file.seek(0)
            # A first row that is a whole array among others is a bad row of JSON Lines.
            whole = second is not None and not isinstance(_line_value(first, decoder), DataError)
            if first.lstrip().startswith(b"[") and not whole:
                yield from _array_rows(file.read().decode("utf-8-sig"), str(path))
                return
            for number, line in enumerate(file, 1):
                if line.removeprefix(_BOM).strip():
                    yield _placed(_line_value(line, decoder), str(path), number)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        yield _placed(DataError(f"cannot be read: {error}"), str(path), number + 1)


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow fills with null because other rows have them."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _arrow_record(record: Any) -> Any:
    if not isinstance(record, Mapping):
        return record
    # An objective whose label is null is an objective all the same.
    return {name: value if name == "pairs" else _without_nulls(value) for name, value in record.items()}


def _parquet_rows(path: Path) -> Iterator[Row]:
    """The rows as the file has them now: a cache would go by its name and time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if len(set(columns)) < len(columns):
                raise ValueError(f"expected columns of different names; got {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(str(path), number, _arrow_record(record))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        problem = DataError(f"cannot be read: {error}", str(path), number + 1 if number else None)
        yield Row(str(path), number + 1, problem)


def _plain(value: Any) -> Any:
    """A value of a pandas frame as plain Python has it; a missing one is None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    missing = value is sys.modules["pandas"].NA or value != value  # NaN and NaT
    return None if missing else value


def _table_rows(table: Iterable[Any], convert: Callable[[Any], Any] = lambda record: record) -> Iterator[Row]:
    return (Row("rows", number, convert(record)) for number, record in enumerate(table, 1))


def _check_split(split: str | None, own: str | None, source: str) -> None:
    """DataError for a split other than the one that ``source`` is; one of no name is the training split."""
    if split is not None and _canonical(split) != _canonical(own or "train"):
        raise DataError(f"no split {one_line(repr(split))}, there is: {own or 'one without a name'}", source)


def _of_objects(source: Any, split: str | None) -> Iterator[Row]:
    """Rows of a table or of a list, by what kind of thing it is."""
    datasets = import_datasets()
    pandas = sys.modules.get("pandas")
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise DataError(f"expected one of {', '.join(map(str, source))}; got {split!r}", field="split")
        source, split = source[split], None
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        _check_split(split, None if source.split is None else str(source.split), "rows")
        return _table_rows(source.with_format(None), _arrow_record)
    _check_split(split, None, "rows")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        names = list(source.columns)
        if not source.columns.is_unique:
            raise ValueError(f"path_or_dataset: expected columns of different names; got {', '.join(map(str, names))}")
        values = (dict(zip(names, row, strict=True)) for row in source.itertuples(index=False, name=None))
        return _table_rows(values, lambda record: _arrow_record(_plain(record)))
    if not isinstance(source, Iterable):
        raise TypeError(f"path_or_dataset: expected a path, a name, a Dataset or rows; got {type(source).__name__}")
    return _table_rows(source, lambda record: record.to_dict() if isinstance(record, PreferenceExample) else record)


def _from_hub(path: str, label: str, split: str | None, **options: Any) -> Iterator[Row]:
    """Through ``datasets.load_dataset``."""
    datasets = import_datasets()
    dataset = datasets.load_dataset(path, split=split, **{k: v for k, v in options.items() if v is not None})
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            raise DataError(f"has several splits ({', '.join(dataset)}): pass split=", label)
        (dataset,) = dataset.values()
    return (row._replace(source=label) for row in _table_rows(dataset, _arrow_record))


def _is_text(path: Path) -> bool:
    return path.name.endswith(_TEXT_SUFFIXES)


def _is_data(path: Path) -> bool:
    return (_is_text(path) or path.suffix == ".parquet") and path.name not in _NO_DATA


def _bare(path: Path) -> str:
    """The name of a data file without its suffixes."""
    suffix = next((suffix for suffix in (*_TEXT_SUFFIXES, ".parquet") if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def _stem(path: Path) -> str:
    """The same without what tells shards apart."""
    return _SHARD.sub("", _bare(path))


def _canonical(split: str) -> str:
    return _SPLIT_WORDS.get(split.lower(), split)


def _word(name: str) -> str | None:
    """The kind of split that a name speaks of."""
    return next((_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS), None)


def _split_of(path: Path, root: Path) -> str | None:
    """The split that a file belongs to: its name where that speaks of one, else the name of such a folder."""
    *folders, _ = path.relative_to(root).parts
    return next((_canonical(name) for name in (_stem(path), *reversed(folders)) if _word(name)), None)


def _by_convention(folder: Path) -> dict[str | None, list[Path]]:
    """Split -> its data files, by the names of files and folders."""
    by_split: dict[str | None, list[Path]] = {}
    others = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.is_file() or path.name in _NO_DATA:
            continue
        if _is_data(path):
            by_split.setdefault(_split_of(path, folder), []).append(path)
        elif path.name.lower().endswith((*_TEXT_SUFFIXES, ".parquet", *_OTHER_SUFFIXES)):
            others.append(str(path.relative_to(folder)))
    if others:
        expected = ", ".join((*_TEXT_SUFFIXES, ".parquet"))
        logger.warning(
            f"{one_line(str(folder))}: files that are not read, as their names do not end in {expected}: {some(others)}"
        )
    if not by_split:
        raise DataError("no JSON Lines or parquet file in this folder", str(folder))
    return by_split


def _card(folder: Path) -> list[Mapping[str, Any]]:
    """The configurations that a data set card in the folder describes."""
    path = folder / "README.md"
    if not path.is_file():
        return []
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip("\ufeff\n "):
        return []
    try:
        card = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise DataError(f"not valid YAML between its lines of ---: {error}", str(path)) from None
    found = card.get("configs") if isinstance(card, Mapping) else None
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _choose_config(cards: Sequence[Mapping[str, Any]], name: str | None, folder: Path) -> Mapping[str, Any] | None:
    names = [str(item.get("config_name", "default")) for item in cards]
    if name is not None:
        if name not in names:
            raise DataError(f"no configuration {name!r}, there are: {', '.join(names) or 'none'}", str(folder))
        return cards[names.index(name)]
    if len(cards) < 2:
        return cards[0] if cards else None
    default = [item for item, own in zip(cards, names, strict=True) if item.get("default") or own == "default"]
    if len(default) != 1:
        raise DataError(f"has several configurations ({', '.join(names)}): pass name=", str(folder))
    return default[0]


def _by_card(folder: Path, data_files: Any) -> dict[str | None, list[Path]]:
    """Split -> its files, as ``data_files`` of a data set card says: patterns, for the training split or by split."""
    if isinstance(data_files, Mapping):
        entries = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(item, Mapping) for item in data_files):
        entries = [(item.get("split"), item.get("path")) for item in data_files]
    else:
        entries = [("train", data_files)]
    by_split: dict[str | None, list[Path]] = {}
    for split, patterns in entries:
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            safe = isinstance(pattern, str) and pattern and not Path(pattern).is_absolute()
            if not safe or ".." in Path(pattern).parts:
                raise DataError(f"README.md: expected patterns of files in this folder; got {pattern!r}", str(folder))
            files = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
            if not files or not all(map(_is_data, files)):
                raise DataError(f"README.md: no JSON Lines or parquet file is named {pattern!r}", str(folder))
            by_split.setdefault(_canonical(str(split)), []).extend(files)
    # Patterns may overlap.
    return {split: list(dict.fromkeys(files)) for split, files in by_split.items()}


def _folder_files(folder: Path, name: str | None, data_dir: str | None, split: str | None) -> list[Path]:
    """The files of a folder that belong to ``split``; which one must be said when there are several."""
    config = None if data_dir and name is None else _choose_config(_card(folder), name, folder)
    part = data_dir or (config or {}).get("data_dir")
    inner = folder / str(part) if part else folder
    if config is not None and config.get("data_files") is not None:
        by_split = _by_card(inner, config["data_files"])
    else:
        by_split = _by_convention(inner)
    chosen = _choose_split(by_split, split, inner)
    files = by_split[chosen]
    forms: dict[Path, list[str]] = {}
    for path in files:
        forms.setdefault(path.with_name(_bare(path)), []).append(path.name)
    if twice := [names for names in forms.values() if len(names) > 1]:
        raise DataError(f"expected every row once; got one file in several forms: {', '.join(twice[0])}", str(inner))
    if len({(path.parent, _stem(path)) for path in files}) > 1:
        listed = ", ".join(str(path.relative_to(inner)) for path in files[:10])
        more = f" and {len(files) - 10} more" if len(files) > 10 else ""
        logger.warning(one_line(f"{inner}: {len(files)} files are read as one split: {listed}{more}"))
    return files


def _choose_split(by_split: Mapping[str | None, object], split: str | None, folder: Path) -> str | None:
    """The key of ``by_split`` that ``split`` means."""
    names = ", ".join(sorted(name or "(other files)" for name in by_split))
    if split is None:
        if len(by_split) > 1:
            raise DataError(f"has several splits ({names}): pass split=", str(folder))
        return next(iter(by_split))
    wanted = _canonical(split)
    if wanted in by_split:
        return wanted
    similar = [name for name in by_split if name is not None and _word(name) == wanted]
    if len(similar) == 1:
        return similar[0]
    if set(by_split) == {None} and wanted == "train":
        return None
    problem = f"several splits are {split!r}" if similar else f"no split {split!r}"
    raise DataError(f"{problem}, there are: {names}", str(folder))


def _saved_rows(path: Path, split: str | None) -> Iterator[Row]:
    """The rows of what ``datasets.save_to_disk`` wrote."""
    saved = import_datasets().load_from_disk(str(path))
    if isinstance(saved, dict):
        saved = saved[_choose_split(saved, split, path)]
    else:
        _check_split(split, None if saved.split is None else str(saved.split), str(path))
    return (row._replace(source=str(path)) for row in _table_rows(saved.with_format(None), _arrow_record))


def open_rows(
    source: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
) -> tuple[str, Iterator[Row]]:
    """(what the source is called, its rows, at most ``max_rows``); a row that cannot be read is a DataError.

    Raises:
        DataError: no such file, folder, configuration or split, or several of them.
        ValueError: a stream without an end that is known, and no ``max_rows``.
        TypeError: a source that has no rows.
    """
    if not isinstance(source, (str, os.PathLike)):
        rows = _of_objects(source, split)
        if max_rows is None and not isinstance(source, (Sized, Mapping)):
            raise ValueError(
                "max_rows: expected a number of rows to read of a source that does not say how many it has; got None "
                f"for a {type(source).__name__}"
            )
        return "rows", itertools.islice(rows, max_rows)
    path = Path(source)
    if not path.exists() and _HUB_NAME.fullmatch(str(source)) and not _is_data(path):
        label = "/".join(part for part in (str(source), name, data_dir) if part)
        rows = _from_hub(str(source), label, split, name=name, data_dir=data_dir, revision=revision)
        return label, itertools.islice(rows, max_rows)
    given = {"revision": revision} if path.is_dir() else {"revision": revision, "name": name, "data_dir": data_dir}
    for option, value in given.items():
        if value is not None and path.exists():
            raise ValueError(f"{option}: expected None for a {'folder' if path.is_dir() else 'file'}; got {value!r}")
    if path.is_dir():
        inner = path / data_dir if data_dir else path
        if any((inner / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return str(inner), itertools.islice(_saved_rows(inner, split), max_rows)
        files = _folder_files(path, name, data_dir, split)
        path = inner
    elif path.is_file():
        if not _is_data(path):
            raise DataError(f"expected {', '.join(_TEXT_SUFFIXES)} or .parquet", str(path))
        _check_split(split, _word(_stem(path)) and _canonical(_stem(path)), str(path))
        files = [path]
    else:
        raise DataError("no such file or folder", str(source))
    rows = itertools.chain.from_iterable(
        read_text_rows(file) if _is_text(file) else _parquet_rows(file) for file in files
    )
    return str(path), itertools.islice(rows, max_rows)
