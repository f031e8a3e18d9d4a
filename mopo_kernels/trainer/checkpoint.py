"""Checkpoints that are whole or not there.

``transformers.Trainer`` writes a checkpoint file by file and resumes from the newest folder, finished or not. Here a
manifest, written last and renamed into place, names every file with its size; a folder without one, or with a file
missing or short, is left alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "mopo_state.pt"
MANIFEST_FILE = "mopo_manifest.json"


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


def complete_checkpoint(folder: Path) -> None:
    """Everything is written: make the folder count."""
    write_atomically(folder / MANIFEST_FILE, json.dumps({"files": _sizes(folder)}, indent=1) + "\n")


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` has a manifest and every file it names in full length."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    found = _sizes(folder)
    return STATE_FILE in files and all(found.get(name) == size for name, size in files.items())


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint in ``output_dir``, or None.

    Args:
        output_dir: the ``output_dir`` of a run; need not exist.
    """
    found = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdigit() and is_complete(folder):
            found.append((int(step), str(folder)))
    return max(found)[1] if found else None
