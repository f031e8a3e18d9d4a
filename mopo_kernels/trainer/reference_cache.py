"""Log-probabilities of the first reference, computed once and kept in a file for the runs to come.

The file is JSON Lines: the first line says what the numbers were computed from, every other is
``[example, [nats, ...], checksum]``, a row with its CRC-32. While the pass runs the same lines are appended to a hidden
file beside it, which takes its name when it is whole; an interrupted pass goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, gather_object  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mopo_kernels.data import PreferenceCollator, PreferenceData
from mopo_kernels.data.tokenized import text_digest
from mopo_kernels.trainer.batch_layout import forward_arguments
from mopo_kernels.trainer.checkpoint import writing
from mopo_kernels.trainer.lm_head import causal_lm
from mopo_kernels.trainer.noise import NOISE
from mopo_kernels.trainer.reference_model import base_parameters

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

#: How the name of such a file ends. Not a suffix of data: a folder of preference files may hold them.
SUFFIX = ".logprob"

# Batches of each rank between two writes: what an interruption costs. One would make every rank wait for the slowest
# batch of each round, and the disk for each.
_BATCHES_A_WRITE = 8

# Between two looks at a file that another process is computing.
_WAIT_SECONDS = 2.0

# Settings of a model that say nothing about its log-probabilities, or that the Trainer sets itself.
_IRRELEVANT = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "id2label", "label2id")

# How an error names a fingerprint that is another.
_ANOTHER = {
    "model": "another model",
    "config": "another model configuration",
    "data": "other data",
    "tokenizer": "another tokenizer",
}

Rows = dict[int, list[float]]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def config_fingerprint(model: nn.Module) -> str:
    """Tells models of equal weights apart by what else shapes their log-probabilities, such as the rotary base."""
    settings = causal_lm(model).config.to_diff_dict()
    return _digest(
        {
            name: str(value)
            for name, value in settings.items()
            if not name.startswith("_")
            and not name.endswith("_token_id")
            and name not in _IRRELEVANT
            # The reference has none, whatever the configuration says.
            and not NOISE.search(name)
        }
    )


def reference_key(
    model: nn.Module,
    data: PreferenceData,
    collator: PreferenceCollator,
    accelerator: Accelerator,
    model_fingerprint: str,
) -> dict[str, Any]:
    """What the log-probabilities of ``data`` depend on, fit for JSON.

    ``model``, ``config``, ``data`` and ``tokenizer`` (with its template and the options of rendering) are fingerprints.
    The device, the batch size, the number of ranks and the layout move results by rounding only, and are left out.
    """
    return {
        "model": model_fingerprint,
        "config": config_fingerprint(model),
        "data": text_digest(data, "id"),
        "tokenizer": collator.renderer.fingerprint(),
        "dtype": ", ".join(sorted({str(value.dtype).removeprefix("torch.") for _, value in base_parameters(model)})),
        "mixed_precision": str(accelerator.mixed_precision),
        "max_length": collator.max_length,
        "max_response_length": collator.max_response_length,
        "truncate": collator.truncate,
    }


def reference_file(place: Path, fallback: Path, key: Mapping[str, Any]) -> Path:
    """The file for ``key``: ``place`` itself where its name ends in ``SUFFIX``, else one named after the key in it.

    Different keys have different names in a folder. Where it can neither be written nor has the file, the folder
    ``fallback`` is taken.
    """
    if place.suffix == SUFFIX:
        return place
    name = f"reference-{_digest(dict(key))[:12]}{SUFFIX}"
    if place == fallback:
        return place / name
    try:
        there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        if (place / name).is_file() or os.access(there, os.W_OK | os.X_OK):
            return place / name
    except PermissionError:  # a folder on the way that cannot even be looked into
        pass
    logger.warning("%s cannot be written: reference log-probabilities are kept in %s", place, fallback)
    return fallback / name


def _checksum(row: Sequence[Any]) -> int:
    """Of ``(example, values)``: a number that has changed on the disk is as wrong as one of another model."""
    return zlib.crc32(json.dumps(list(row)).encode())


class ReferenceFile:
    """The log-probabilities of one data set on disk, whole or in the making.

    One process at a time computes them, under a lock that dies with it.

    Args:
        path: of the whole file.
        key: of ``reference_key``.
        examples: how many there are.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], examples: int) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.key = dict(key)
        self.examples = examples
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._out: IO[bytes] | None = None

    def open(self) -> Rows | None:
        """All rows, or those that an interrupted pass left and the right to go on; None while another process has it.

        Raises:
            ValueError: the file is of something else, or damaged. OSError: it cannot be read or written.
        """
        if self.path.is_dir():
            raise ValueError(f"reference_path: expected a file, as its name ends in {SUFFIX}; {self.path} is a folder")
        if self.path.is_file():
            return self._whole()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return None
        # Another process may have finished it since the first look.
        if self.path.is_file():
            return self._whole()
        self.partial.touch()
        _, rows, end = self._read(self.partial)
        self._out = self.partial.open("r+b")
        self._out.truncate(end)
        self._out.seek(end)
        if not end:
            self._write([self.key])
        return rows

    def append(self, rows: Sequence[tuple[int, list[float]]]) -> None:
        """Keep ``(example, values)`` rows, on disk when this returns."""
        self._write([[*row, _checksum(row)] for row in rows])

    def finish(self) -> None:
        """Every example is there: give the file its name. After a power cut it may have its old one, and be whole."""
        if self._out is None:
            return
        self._out.close()
        self.partial.replace(self.path)

    def close(self) -> None:
        """Let others go on."""
        if self._out is not None:
            self._out.close()
        if self._lock.is_locked and self.path.is_file():
            # While it is held, so that whoever takes the next one finds the whole file.
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _write(self, lines: Sequence[Any]) -> None:
        assert self._out is not None
        kept = "the same run goes on from those that are there"
        with writing(f"reference_path: log-probabilities in {self.partial}", self.path.parent, lambda: kept):
            self._out.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            self._out.flush()
            os.fsync(self._out.fileno())

    def _read(self, file: Path) -> tuple[Any, Rows, int]:
        """(first line, rows, bytes up to the first line that is torn, changed or of another key)."""
        first: Any = None
        rows: Rows = {}
        end = 0
        with file.open("rb") as lines:
            for line in lines:
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    content = None
                if first is None:
                    first = content
                    if first != self.key:
                        break
                elif isinstance(content, list) and self._is_row(content):
                    rows[content[0]] = content[1]
                else:
                    break
                end += len(line)
        return first, rows, end

    def _is_row(self, content: list[Any]) -> bool:
        if [type(part) for part in content] != [int, list, int] or content[2] != _checksum(content[:2]):
            return False
        return 0 <= content[0] < self.examples

    def _whole(self) -> Rows:
        first, rows, _ = self._read(self.path)
        if first == self.key and len(rows) == self.examples:
            return rows
        if not isinstance(first, dict) or first.keys() != self.key.keys():
            found = "something else"
        elif first == self.key:
            found = f"those of {len(rows)} of {self.examples} examples"
        else:
            found = "those of " + ", ".join(
                _ANOTHER.get(name, f"{name} {first[name]}") for name, value in self.key.items() if first[name] != value
            )
        raise ValueError(
            f"reference_path: expected this run's reference log-probabilities in {self.path}; got {found} (name "
            "another file or a folder, or delete this one to compute them again)"
        )


def reference_logprobs(
    model: nn.Module,
    data: PreferenceData,
    collator: PreferenceCollator,
    accelerator: Accelerator,
    *,
    place: Path,
    fallback: Path,
    model_fingerprint: str,
    batch_size: int,
    progress: bool,
    sharing: int = 1,
) -> list[list[float]]:
    """Summed log-probability of every response under the first reference: per example, per response, nats.

    Read from the file of :func:`reference_file` when it is whole. Otherwise the ranks share the batches that it lacks,
    and the first keeps the results in it as they come; a batch has the same examples whatever was done before and on
    however many ranks, so that a resumed pass ends bit for bit where an undisturbed one ends.

    Args:
        model: with the forward of ``forward.attach``.
        data: the examples.
        collator: of the training run.
        accelerator: its ranks, device and mixed precision, so that the numbers are those of the policy's own pass.
        place, fallback: where the file is, see :func:`reference_file`.
        model_fingerprint: of the reference.
        batch_size: examples a forward pass.
        progress: whether to show a bar.
        sharing: neighbouring ranks that compute every batch together (tensor parallelism).

    Raises:
        ValueError: the file is of another model, other data, another tokenizer or another precision, or cannot be
            written; a log-probability is not finite.
    """
    key = reference_key(model, data, collator, accelerator, model_fingerprint)
    file: ReferenceFile | None = None
    if accelerator.is_main_process:
        file = ReferenceFile(reference_file(place, fallback, key), key, len(data))
    try:
        done = _open(file, accelerator)
        _compute_missing(model, data, collator, accelerator, file, done, batch_size, progress, sharing)
    finally:
        if file is not None:
            file.close()
    return [done[index] for index in range(len(data))]


def _open(file: ReferenceFile | None, accelerator: Accelerator) -> Rows:
    """What the first rank's file has, on every rank; waits while another process computes it."""
    waiting = False
    while True:
        # Every rank must take the same branch, and only the first is sure to see the file.
        answer: list[Any] = [None]
        if file is not None:
            try:
                answer[0] = file.open()
            except OSError as error:
                answer[0] = f"reference_path: cannot use {file.path}: {error}"
            except ValueError as error:
                answer[0] = str(error)
        if accelerator.num_processes > 1:
            broadcast_object_list(answer)
        if isinstance(answer[0], str):
            raise ValueError(answer[0])
        if answer[0] is not None:
            return dict(answer[0])
        if file is not None and not waiting:
            logger.warning("another process is computing %s: waiting for it", file.path)
        waiting = True
        time.sleep(_WAIT_SECONDS)


def _compute_missing(
    model: nn.Module,
    data: PreferenceData,
    collator: PreferenceCollator,
    accelerator: Accelerator,
    file: ReferenceFile | None,
    done: Rows,
    batch_size: int,
    progress: bool,
    sharing: int,
) -> None:
    """Fill ``done`` up on every rank, and the file."""
    ranks = accelerator.num_processes // sharing
    batches = [list(range(start, min(start + batch_size, len(data)))) for start in range(0, len(data), batch_size)]
    lacking = [batch for batch in batches if not all(index in done for index in batch)]
    mine = lacking[accelerator.process_index // sharing :: ranks]
    loader = iter(DataLoader(data, batch_sampler=mine, collate_fn=collator))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    bar = tqdm(
        total=len(data),
        initial=len(done),
        desc="Reference log-probabilities",
        disable=not (lacking and progress and accelerator.is_main_process),
    )
    with torch.no_grad(), accelerator.autocast(), bar:
        for start in range(0, math.ceil(len(lacking) / ranks), _BATCHES_A_WRITE):
            rows: list[tuple[int, list[float]]] = []
            for indices in mine[start : start + _BATCHES_A_WRITE]:
                batch = {name: value for name, value in next(loader).items() if name != "ref_logprob"}
                logprob = model(**forward_arguments(batch, device), reference_only=True)["ref_logprob"].tolist()
                values: list[list[float]] = [[] for _ in indices]
                for position, value in zip(batch["prompt_index"].tolist(), logprob, strict=True):
                    values[position].append(value)
                rows += zip(indices, values, strict=True)
                bar.update(len(indices) * ranks)
            if accelerator.num_processes > 1:
                rows = list(dict(gather_object(rows)).items())
            for index, numbers in rows:
                if not all(map(math.isfinite, numbers)):
                    raise ValueError(
                        f"model: expected finite log-probabilities of {data[index].name} under the reference; "
                        f"got {numbers}"
                    )
            done.update(rows)
            if file is not None:
                file.append(rows)
    if file is not None:
        file.finish()
