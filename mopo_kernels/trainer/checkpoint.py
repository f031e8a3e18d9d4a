"""Checkpoints that are whole or not there.

``transformers.Trainer`` writes a checkpoint file by file and resumes from the newest folder, finished or not. Here a
manifest, written last and renamed into place, names every file with its size; a folder without one, or with a file
missing or short, is left alone.

A run that starts afresh in a folder with checkpoints of another must not resume from those, whose steps may well be
higher. So every run has an identity, which its manifests and a file in its folder hold.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "mopo_state.pt"
MANIFEST_FILE = "mopo_manifest.json"
RUN_FILE = "mopo_run.json"


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


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE and not path.name.endswith(".partial")
    }


def begin_checkpoint(folder: Path) -> None:
    """From here until ``complete_checkpoint`` the folder does not count."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def complete_checkpoint(folder: Path, run: str | None) -> None:
    """Everything is written: make the folder count, as a checkpoint of ``run``."""
    manifest = {"run": run, "files": _sizes(folder)}
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` has a manifest and every file it names in full length."""
    folder = Path(folder)
    files = _read(folder / MANIFEST_FILE).get("files")
    if not isinstance(files, dict):
        return False
    found = _sizes(folder)
    return STATE_FILE in files and all(found.get(name) == size for name, size in files.items())


def begin_run(output_dir: Path) -> str:
    """A new run in ``output_dir``, by its identity: the checkpoints that are there no longer count."""
    run = uuid.uuid4().hex
    output_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / RUN_FILE, json.dumps({"run": run}) + "\n")
    return run


def continue_run(output_dir: Path, checkpoint: str | os.PathLike[str]) -> str | None:
    """The run of ``checkpoint`` goes on in ``output_dir``; None for one of a version without identities."""
    run: str | None = _read(Path(checkpoint) / MANIFEST_FILE).get("run")
    if run is None:
        (output_dir / RUN_FILE).unlink(missing_ok=True)
    else:
        write_atomically(output_dir / RUN_FILE, json.dumps({"run": run}) + "\n")
    return run


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of the last run in ``output_dir``, or None.

    Args:
        output_dir: the ``output_dir`` of a run; need not exist.
    """
    run = _read(Path(output_dir) / RUN_FILE).get("run")
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if not step.isdigit() or (run is not None and _read(folder / MANIFEST_FILE).get("run") != run):
            continue
        if is_complete(folder):
            found.append((int(step), str(folder)))
    return max(found)[1] if found else None
