"""``load_preferences``: from files, folders, hub data sets and lists to validated ``PreferenceData``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from mopo_kernels.data.columns import Columns, parse_columns
from mopo_kernels.data.converters import CONVERTERS, Converter, Row
from mopo_kernels.data.dataset import PreferenceData, import_datasets, merge_preferences, nothing_usable
from mopo_kernels.data.schema import DataError, PreferenceExample
from mopo_kernels.data.sources import open_rows


def _kind_of(record: Mapping[str, Any]) -> type[Converter] | None:
    """The format whose columns these are."""
    return next((converter for converter in CONVERTERS.values() if converter.matches(record)), None)


def _unknown(record: Mapping[str, Any]) -> DataError:
    return DataError(
        f"cannot tell the format from the columns {', '.join(map(str, record)) or 'of this row, which are none'}: pass "
        f"format= one of {', '.join(CONVERTERS)}, or columns= (--columns) such as prompt=NAME,chosen=NAME,rejected=NAME"
    )


def _named_rows(rows: Iterable[Row], names: Columns, reject: Callable[[DataError], None]) -> Iterator[Row]:
    """The rows that are objects, under the schema's names."""
    for row in rows:
        try:
            if isinstance(row.record, DataError):
                raise row.record
            if not isinstance(row.record, Mapping):
                raise DataError(f"expected an object; got {type(row.record).__name__}")
            record, fields = names.standard(row.record)
        except DataError as error:
            reject(error if isinstance(row.record, DataError) else error.at(row.source, row.line))
            continue
        yield row._replace(record=record, fields=fields)


def _known_rows(rows: Iterator[Row], reject: Callable[[DataError], None]) -> Iterator[Row]:
    """The rows from the first on whose format can be told."""
    for row in rows:
        if _kind_of(row.record) is not None:
            yield row
            yield from rows
            return
        reject(_unknown(row.record).at(row.source, row.line))


def detect_format(path_or_dataset: Any, columns: Mapping[str, str] | str | None = None, **place: Any) -> str | None:
    """The format that "auto" takes, None where no row tells it; the arguments are those of ``load_preferences``."""
    _, rows = open_rows(path_or_dataset, **place)

    def ignore(error: DataError) -> None:
        pass

    first = next(_known_rows(_named_rows(rows, Columns(parse_columns(columns)), ignore), ignore), None)
    kind = None if first is None else _kind_of(first.record)
    return None if kind is None else kind.name


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
    max_rows: int | None = None,
    columns: Mapping[str, str] | str | None = None,
    group: bool = False,
    progress: Callable[[], object] | None = None,
    **format_options: Any,
) -> PreferenceData:
    """Load pairwise preferences from what there is, validate every row, and report the rows left out.

    Args:
        path_or_dataset: a JSON Lines (also gzipped) or parquet file, a folder of them, a folder that
            ``datasets.save_to_disk`` wrote, the name of a data set on the hub, a ``datasets.Dataset``, a pandas frame,
            a list of dicts, or with ``max_rows`` a stream of them. A dict ``{objective: any of these}`` loads
            single-objective sets (hh-rlhf, TRL) and merges them by prompt (``merge_preferences``).
        format: "canonical", "pku-saferlhf", "helpsteer" (1 and 2), "ultrafeedback", "summarize-from-feedback",
            "hh-rlhf", "trl", or "auto": by the columns of the first row that tells it.
        objectives: the objectives and their order. A format with a fixed list of them gives only these; in the
            canonical format any other name is an error. Default: all, in the order of their first appearance.
        split: which split of a folder or a hub data set; needed when there are several. A folder's are those of its
            data set card (README.md), or go by the names of its files and folders.
        on_error: "raise" stops at the first bad row; "skip" leaves it out and lists it in ``.skipped``.
        name: configuration of a hub data set, or of a folder with a data set card.
        data_dir: sub-folder, such as "harmless-base".
        revision: of a hub data set.
        max_prompt_chars: a longer prompt is a bad row.
        max_response_chars: a longer response is a bad row.
        max_rows: read this many rows at most.
        columns: the schema's name of a column to the rows' own, such as ``{"prompt": "question"}`` or
            ``"prompt=instruction+input,system=persona"``, where "+" joins two by a new line; an empty name says that
            there is none. Common names are found by themselves. ``system`` and ``history`` become messages of the
            prompt, ``tools`` and ``chat_template_kwargs`` go to the chat template, images are refused, and further
            columns but scores, ids and the like are named once in the log.
        group: join the examples that share a prompt.
        progress: called once per row read.
        **format_options: ``signs`` (helpsteer), ``objective`` (hh-rlhf, trl, summarize-from-feedback),
            ``conversational`` (hh-rlhf), ``template`` (summarize-from-feedback).

    Returns:
        ``PreferenceData``, which works as ``train_dataset`` of ``transformers.Trainer``.

    Raises:
        DataError: a bad row (file, line and field in the message), or no usable row.
        ValueError: an unknown format, option, objective or column, or a stream without ``max_rows``.
        ImportError: the ``datasets`` library is missing.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error: expected 'raise' or 'skip'; got {on_error!r}")
    if format != "auto" and format not in CONVERTERS:
        raise ValueError(f"format: expected auto, {', '.join(CONVERTERS)}; got {format!r}")
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
        "max_rows": max_rows,
        "columns": columns,
        "progress": progress,
    }
    of_splits = isinstance(path_or_dataset, (datasets.DatasetDict, datasets.IterableDatasetDict))
    if isinstance(path_or_dataset, Mapping) and not of_splits:
        if objectives is not None and set(objectives) != set(path_or_dataset):
            raise ValueError(f"objectives: expected the keys {sorted(path_or_dataset)}; got {sorted(objectives)}")
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

    def counted(rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            if progress is not None:
                progress()
            yield row

    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows: expected a positive number of rows; got {max_rows}")
    names = Columns(parse_columns(columns))
    origin, source_rows = open_rows(
        path_or_dataset, split=split, name=name, data_dir=data_dir, revision=revision, max_rows=max_rows
    )
    rows = _named_rows(counted(source_rows), names, reject)
    if format == "auto":
        rows = _known_rows(rows, reject)
    first = next(rows, None)
    if first is None:
        raise nothing_usable(skipped, origin)
    kind = _kind_of(first.record) if format == "auto" else CONVERTERS[format]
    assert kind is not None  # of the rows that are known
    names.check_names(kind.known)
    converter = _build_converter(
        kind, format_options, objectives=objectives, origin=origin, max_response_chars=max_response_chars, names=names
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
            for part in (row, *row.others):
                reject(error.at(part.source, part.line, row.fields))
    names.check()
    names.report(origin)
    if not examples:
        raise nothing_usable(skipped, origin)
    if objectives is None and converter.available:
        # The schema's own order, not that in which N/A ratings let the names appear.
        objectives = [name for name in converter.available if _labelled(examples, name)]
    data = PreferenceData.from_examples(examples, objectives, skipped)
    return data.group_by_prompt() if group else data


def _labelled(examples: Iterable[PreferenceExample], objective: str) -> bool:
    return any(pair.preference.get(objective) is not None for example in examples for pair in example.pairs)
