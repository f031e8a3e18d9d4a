"""Token ids of a whole data set before training begins: made in several processes, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopo_kernels.data.dataset import PreferenceData, import_datasets
from mopo_kernels.data.rendering import RenderedTokens, Renderer
from mopo_kernels.data.schema import DataError, PreferenceExample

if TYPE_CHECKING:
    from datasets import Dataset

# Columns on which no token depends.
_LABELS = ("pairs", "weight", "ref_logprob")
# Examples that are worth a process of their own, and a file.
_EXAMPLES_A_PROCESS = 2000
# Examples that are rendered and tokenised in one call.
_BATCH = 200


def content_digest(data: PreferenceData, *leave_out: str) -> str:
    """SHA-256 of every column in order, but those to leave out."""
    digest = hashlib.sha256()
    columns = [name for name in data.dataset.column_names if name not in leave_out]
    for rows in data.dataset.select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def text_digest(data: PreferenceData, *leave_out: str) -> str:
    """Of everything that tokens depend on: every column but labels, weights and those to leave out."""
    return content_digest(data, *_LABELS, *leave_out)


def text_key(example: PreferenceExample) -> str:
    """Equal for examples of equal texts."""
    content = {name: value for name, value in example.to_dict().items() if name not in (*_LABELS, "id")}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def available_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenize_data(renderer: Renderer, data: PreferenceData, num_proc: int | None = None) -> Dataset:
    """A row of token ids and counts for each example; of one that cannot be rendered, the problem.

    Larger data sets are tokenised in several processes, and kept in the cache of ``datasets`` under a name that says
    which texts, tokenizer and options they are of: who asks again reads them there.

    Args:
        renderer: of the tokenizer.
        data: the examples.
        num_proc: processes; None is one for every 2000 examples, at most one a core.

    Returns:
        With the columns ``key`` (see :func:`text_key`), ``prompt``, ``responses`` (ids), ``lengths`` (tokens of the
        prompt and of each response), ``largest`` (id), ``form``, ``neutralized``, ``left_out`` (as of
        ``RenderedTokens``), ``problem`` and ``field`` (None where there is none).
    """
    datasets = import_datasets()
    function = partial(_tokenized_batch, renderer=renderer)
    features = _features(datasets)
    if num_proc is None:
        num_proc = min(available_cores(), len(data) // _EXAMPLES_A_PROCESS)
    if len(data) < _EXAMPLES_A_PROCESS:
        return datasets.Dataset.from_dict(function(data.dataset[:]), features=features)
    content = json.dumps([text_digest(data), renderer.fingerprint(), str(features)])
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mopo_tokenized"
    return data.dataset.map(
        function,
        batched=True,
        batch_size=_BATCH,
        remove_columns=data.dataset.column_names,
        features=features,
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=_writable(folder, f"{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key,
        desc="Tokenising",
    )


def _writable(folder: Path, name: str) -> str | None:
    """The place of a file in ``folder``, or None where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder / name) if os.access(folder, os.W_OK | os.X_OK) else None


def _features(datasets: Any) -> Any:
    ids, text = [datasets.Value("int32")], datasets.Value("string")
    count = datasets.Value("int64")
    return datasets.Features(
        {
            "key": text,
            "prompt": ids,
            "responses": [ids],
            "lengths": [count],
            "largest": count,
            "form": text,
            "neutralized": datasets.Value("bool"),
            "left_out": count,
            "problem": text,
            "field": text,
        }
    )


def _tokenized_batch(columns: dict[str, list[Any]], renderer: Renderer) -> dict[str, list[Any]]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    examples = [PreferenceExample.from_dict(row) for row in rows]
    try:
        found: Iterable[RenderedTokens | DataError] = renderer.tokenize(examples)
    except DataError:
        found = [_tokens_or_problem(renderer, example) for example in examples]
    records = [_record(example, item) for example, item in zip(examples, found, strict=True)]
    return {name: [record[name] for record in records] for name in records[0]}


def _tokens_or_problem(renderer: Renderer, example: PreferenceExample) -> RenderedTokens | DataError:
    try:
        return renderer.tokenize([example])[0]
    except DataError as error:
        return error


def _record(example: PreferenceExample, item: RenderedTokens | DataError) -> dict[str, Any]:
    key = text_key(example)
    if isinstance(item, DataError):
        empty: dict[str, Any] = {"prompt": [], "responses": [], "lengths": []}
        counts = {"largest": -1, "form": "", "neutralized": False, "left_out": 0}
        return {"key": key, **empty, **counts, "problem": item.problem, "field": item.field}
    return {
        "key": key,
        "prompt": item.prompt,
        "responses": item.responses,
        "lengths": [len(item.prompt), *map(len, item.responses)],
        "largest": max(chain(item.prompt, *item.responses)),
        "form": item.form,
        "neutralized": item.neutralized,
        "left_out": item.left_out,
        "problem": None,
        "field": None,
    }
