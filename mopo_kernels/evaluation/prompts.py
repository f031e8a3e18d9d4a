"""Prompts as a policy and a judge see them, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopo_kernels.data.columns import Columns
from mopo_kernels.data.rendering import Renderer
from mopo_kernels.data.schema import (
    TEMPLATE_COLUMNS,
    DataError,
    check_media,
    check_prompt,
    is_given,
    join_context,
)

Prompt = str | list[dict[str, str]]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the response to follow, as ``data.rendering.Renderer`` has them by default.

    Raises ValueError for messages without a chat template, and DataError for a prompt that the template refuses.
    """
    return Renderer(tokenizer).prompt_ids(prompt)


def prompt_text(prompt: Prompt) -> str:
    """What a judge sees of a prompt: the str itself, or the last user message."""
    if isinstance(prompt, str):
        return prompt
    users = [message["content"] for message in prompt if message["role"] == "user"]
    if not users:
        raise ValueError(f"prompt: expected a message with role 'user'; got roles {[m['role'] for m in prompt]}")
    return users[-1]


def load_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from a .jsonl file (one object a line, its prompt a str or messages) or a .txt file (one a line).

    The prompt of an object may have the other names that ``load_preferences`` finds; "system" and "history" become
    messages of it, tools and images are refused, and other columns are named in the log. Blank lines are passed over.
    Raises ValueError with file and line for anything else, or for a file with no prompt.
    """
    from mopo_kernels.data.sources import read_text_rows

    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"prompts: expected a .jsonl or .txt file; got {path}")
    if path.suffix == ".jsonl":
        names = Columns({})
        prompts = [_row_prompt(row.record, f"{path}:{row.line}", names) for row in read_text_rows(path)]
        names.report(str(path))
    else:
        try:
            # Not splitlines, which takes characters inside a text for ends of lines, too.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid UTF-8: {error.reason} at byte {error.start + 1}") from None
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt; got none")
    return prompts


def _row_prompt(record: Any, where: str, names: Columns) -> Prompt:
    """The prompt of a row with what else it has of the conversation."""
    try:
        if isinstance(record, DataError):
            raise DataError(record.problem, field=record.field)
        if not isinstance(record, Mapping):
            raise DataError(f"expected an object; got {type(record).__name__}")
        check_media(record)
        for name in TEMPLATE_COLUMNS:
            if is_given(record.get(name)):
                raise DataError("expected none, as sampling does not use it; got some", field=name)
        row, _ = names.find_prompt(names.standard(record)[0])
        names.count_unused(row, ("prompt",))
        return join_context(check_prompt(row.get("prompt")), row)
    except DataError as error:
        # A file of prompts has no mapping of columns.
        raise ValueError(f"{where}: {str(error).partition(': pass columns=')[0]}") from None
