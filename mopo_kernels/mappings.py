"""Mappings as command lines and configuration files write them; needs neither torch nor transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["parse_json", "parse_mapping", "parse_mappings"]


def parse_json(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A mapping, or the JSON of one; None is the empty one.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: expected a JSON object; got {value!r}") from error
    if not isinstance(value, (Mapping, type(None))):
        raise ValueError(f"{name}: expected a mapping; got {value!r}")
    return dict(value or {})


def parse_mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, float]:
    """``{"helpful": 0.45}``, ``"helpful=0.45,other=0.5"`` or a JSON object, as a dict of floats.

    Args:
        name: the argument or option that errors name.
        value: None and the empty string are the empty mapping. An objective's name may hold "=", not ",".

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    expected = f"{name}: expected a mapping of objective to number, or 'name=0.45,other=0.5'"
    if value is None:
        return {}
    items: list[tuple[Any, Any]]
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            try:
                # As pairs: a dict would keep the last of two numbers for one name.
                items = json.loads(value, object_pairs_hook=list)
            except json.JSONDecodeError as error:
                raise ValueError(f"{expected}; got {value!r}") from error
        else:
            parts = [part.rpartition("=") for part in value.split(",") if part.strip()]
            items = [(key.strip(), number.strip()) for key, _, number in parts]
            if not all(key for key, _ in items):
                raise ValueError(f"{expected}; got {value!r}")
    elif isinstance(value, Mapping):
        items = list(value.items())
    else:
        raise ValueError(f"{expected}; got {value!r}")
    result: dict[str, float] = {}
    for key, number in items:
        if str(key) in result:
            raise ValueError(f"{name}: expected every objective once; got {key!r} twice")
        try:
            result[str(key)] = float(number)
        except (TypeError, ValueError):
            raise ValueError(f"{expected}; got {number!r} for {key!r}") from None
        if not math.isfinite(result[str(key)]):
            raise ValueError(f"{name}[{key!r}]: expected a finite number; got {number!r}")
    return result


def parse_mappings(name: str, options: Iterable[str]) -> dict[str, float]:
    """An option that may be repeated, each time in a form of :func:`parse_mapping`, joined.

    Raises:
        ValueError: as :func:`parse_mapping`, or an objective is given twice.
    """
    result: dict[str, float] = {}
    for option in options:
        found = parse_mapping(name, option)
        if twice := [key for key in found if key in result]:
            raise ValueError(f"{name}: expected every objective once; got {twice[0]!r} twice")
        result |= found
    return result
