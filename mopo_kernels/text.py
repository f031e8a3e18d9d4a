"""Names and texts of others, as they may stand in a line, a table and a Markdown file."""

from __future__ import annotations

import re

__all__ = ["markdown", "one_line", "some"]

_ENTITIES = {"&": "&amp;", "<": "&lt;"}


def one_line(text: str) -> str:
    """``text`` with every character escaped that is not printed: line ends, terminal codes, marks of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """``text`` as it shows literally in a line or a table's cell of a Markdown file, HTML in it included."""
    text = re.sub(r"([\\`*\[\]|~$])|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))
    return "".join(_ENTITIES.get(c, c) for c in text)


def some(names: list[str], shown: int = 8) -> str:
    """The first names, each in one line, and how many more there are."""
    more = len(names) - shown
    return ", ".join(map(one_line, names[:shown])) + (f" and {more} more" if more > 0 else "")
