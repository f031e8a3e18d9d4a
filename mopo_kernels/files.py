"""Files that hold a command's results."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_file(option: str, path: Path) -> None:
    """See that a file can be written, before the work whose result it is to hold; missing folders are made.

    Raises:
        ValueError: it cannot; the message names the option.
    """
    if path.is_dir():
        raise ValueError(f"{option}: expected a file to write; got the folder {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: cannot make the folder {path.parent}: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")
