"""Checkpoints that are whole or not there, and one run at a time in a folder.

``transformers.Trainer`` writes a checkpoint file by file and resumes from the newest folder, finished or not. Here a
manifest, written last and renamed into place, names every file with its size and its SHA-256; a folder without one, or
with a file missing, short or changed, is left alone.

A run that starts afresh in a folder with checkpoints of another must not resume from those, whose steps may well be
higher. So every run has an identity, which its manifests and a file in its folder hold; so has what follows a resumed
checkpoint that is not the run's last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATE_FILE = "mopo_state.pt"
MANIFEST_FILE = "mopo_manifest.json"
RUN_FILE = "mopo_run.json"
LOCK_FILE = ".mopo_run.lock"

# Rewritten by whoever certifies or describes a policy; no run reads it.
_CARD_FILE = "README.md"
# What a loader may take for weights or state though the manifest does not name it.
_LOADED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
_HASHED_AT_ONCE = 1 << 20

# By path: a thread that holds one may take it again.
_locks: dict[Path, FileLock] = {}


class WriteError(OSError):
    """A checkpoint or a policy could not be written, as on a full disk; the message says what survived."""


def write_atomically(path: Path, text: str) -> None:
    """``text`` appears at ``path`` whole or not at all, and is on disk before it appears."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """No other process runs in ``output_dir`` meanwhile. The lock dies with its process; within it may be nested. A
    folder that was made for it and stayed empty goes with it.

    Raises:
        ValueError: another run has the folder.
    """
    made = not output_dir.exists()
    output_dir.mkdir(parents=True, exist_ok=True)
    path = (output_dir / LOCK_FILE).resolve()
    lock = _locks.setdefault(path, FileLock(path))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        process = _read(output_dir / RUN_FILE).get("process")
        who = "" if process is None else f" (process {process})"
        raise ValueError(
            f"output_dir: expected a folder in which no other run is under way; got {output_dir}, which one has{who}"
        ) from None
    except (NotImplementedError, OSError) as error:
        # Some network file systems have no locks.
        logger.warning("%s cannot be locked (%s): nothing keeps a second run out of %s", path, error, output_dir)
    try:
        yield
    finally:
        if made and output_dir.is_dir() and os.listdir(output_dir) == [LOCK_FILE]:
            shutil.rmtree(output_dir, ignore_errors=True)
        lock.release()


@contextmanager
def writing(what: str, folder: Path, survived: Callable[[], str]) -> Iterator[None]:
    """A failure to write files becomes one error that says what is left.

    Args:
        what: is being written.
        folder: where.
        survived: says so, once something failed.

    Raises:
        WriteError: in place of what the libraries raise.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, WriteError) or (isinstance(error, RuntimeError) and not _is_of_torch_writer(error)):
            raise
        reason = "torch could not write all of a file" if isinstance(error, RuntimeError) else str(error)
        disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(disk).free / 2**20
        raise WriteError(f"{what} could not be written: {reason}; {free:.0f} MiB are free; {survived()}") from error


def disk_is_full(error: OSError) -> bool:
    """Whether a file could not be written for lack of space, on the disk or in a quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _is_of_torch_writer(error: RuntimeError) -> bool:
    """torch's own writer raises bare RuntimeErrors, and keeps the system's message to itself."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "torch.serialization" for frame, _ in frames)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST_FILE, _CARD_FILE) and not path.name.endswith(".partial")
    }


def _digest(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; with ``sync`` of one that is on disk when this returns."""
    digest = hashlib.sha256()
    with path.open("r+b" if sync else "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def begin_checkpoint(folder: Path) -> None:
    """From here until ``complete_checkpoint`` the folder does not count."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def complete_checkpoint(folder: Path, run: str | None) -> None:
    """Everything is written: make the folder count, as a checkpoint of ``run``."""
    sizes = _sizes(folder)
    digests = {name: _digest(folder / name, sync=True) for name in sizes}
    write_atomically(
        folder / MANIFEST_FILE, json.dumps({"run": run, "files": sizes, "sha256": digests}, indent=1) + "\n"
    )


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def find_damage(folder: str | os.PathLike[str]) -> str | None:
    """Why ``folder`` is no checkpoint to resume from, or None where it is: each file as the manifest has it.

    Reads every file. One of a version without checksums is known by the sizes only.
    """
    folder = Path(folder)
    manifest = _read(folder / MANIFEST_FILE)
    files, digests = manifest.get("files"), manifest.get("sha256", {})
    if not isinstance(files, dict) or not isinstance(digests, dict):
        return f"it has no whole {MANIFEST_FILE}"
    if STATE_FILE not in files:
        return f"it has no {STATE_FILE}"
    found = _sizes(folder)
    for name, size in files.items():
        if name == _CARD_FILE:
            continue
        if found.get(name) != size:
            return f"{name} is missing" if name not in found else f"{name} has {found[name]} of {size} bytes"
    for name in found:
        if name not in files and name.endswith(_LOADED_SUFFIXES):
            return f"{name} was not written with it"
    for name, digest in digests.items():
        if name in found and _digest(folder / name) != digest:
            return f"{name} was changed after it was written (its SHA-256 is another)"
    return None


def _name_run(output_dir: Path, run: str) -> None:
    write_atomically(output_dir / RUN_FILE, json.dumps({"run": run, "process": os.getpid()}) + "\n")


def begin_run(output_dir: Path) -> str:
    """A new run in ``output_dir``, by its identity: the checkpoints that are there no longer count."""
    run = uuid.uuid4().hex
    output_dir.mkdir(parents=True, exist_ok=True)
    _name_run(output_dir, run)
    return run


def continue_run(output_dir: Path, checkpoint: str | os.PathLike[str]) -> str | None:
    """The run of ``checkpoint`` goes on in ``output_dir``; None for one of a version without identities.

    Where ``output_dir`` has later checkpoints of that run, they no longer count: what follows is another run, to which
    ``checkpoint`` now belongs.
    """
    checkpoint = Path(checkpoint)
    manifest = _read(checkpoint / MANIFEST_FILE)
    run: str | None = manifest.get("run")
    if run is None:
        (output_dir / RUN_FILE).unlink(missing_ok=True)
        return None
    within = checkpoint.resolve().parent == output_dir.resolve()
    later = [folder for step, folder in _checkpoints(output_dir, run) if step > (_step(checkpoint) or 0)]
    if within and later:
        logger.warning("going on from %s: %s no longer counts", checkpoint, ", ".join(path.name for path in later))
        run = uuid.uuid4().hex
        write_atomically(checkpoint / MANIFEST_FILE, json.dumps({**manifest, "run": run}, indent=1) + "\n")
    _name_run(output_dir, run)
    return run


def _step(folder: Path) -> int | None:
    step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdecimal() and step.isascii() and folder.name != step else None


def _checkpoints(output_dir: Path, run: str | None) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of ``run``, or of any for None, with a manifest, by step."""
    found = []
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step, manifest = _step(folder), _read(folder / MANIFEST_FILE)
        if step is not None and manifest and (run is None or manifest.get("run") == run):
            found.append((step, folder))
    return sorted(found)


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of the last run in ``output_dir``, or None. One that is damaged is named in a
    warning and passed over.

    Args:
        output_dir: the ``output_dir`` of a run; need not exist.
    """
    output_dir = Path(output_dir)
    for _, folder in reversed(_checkpoints(output_dir, _read(output_dir / RUN_FILE).get("run"))):
        damage = find_damage(folder)
        if damage is None:
            return str(folder)
        # One that cannot be resumed from by the user's own choice, with save_only_model, is none that is damaged.
        if STATE_FILE in _read(folder / MANIFEST_FILE).get("files", {}):
            logger.warning("%s is passed over: %s", folder, damage)
    return None


def rotate(output_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete checkpoints until ``limit`` are left, the oldest by step first.

    Unfinished ones and those of other runs go before this run's; ``newest``, which was just completed, and ``best``
    stay in any case.

    Args:
        output_dir: of the run.
        limit: None or less than 1 is none.
        newest: the checkpoint that was just completed.
        best: the best model's checkpoint, if it is known.
    """
    if limit is None or limit < 1:
        return
    run = _read(newest / MANIFEST_FILE).get("run")
    found = []
    for folder in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step, manifest = _step(folder), _read(folder / MANIFEST_FILE)
        if step is not None:
            found.append((bool(manifest) and manifest.get("run") == run, step, folder))
    kept = {newest.resolve()} | ({Path(best).resolve()} if best is not None else set())
    left = len(found)
    for _, _, folder in sorted(found):
        if left <= max(limit, len(kept)):
            return
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            left -= 1
