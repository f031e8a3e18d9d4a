"""One parser of name=number lists for configuration and command line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mopo_kernels import mappings
from mopo_kernels.mappings import parse_mapping, parse_mappings


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ("", {}),
        ("{}", {}),
        ({"a": 0.25, "b": 1}, {"a": 0.25, "b": 1.0}),
        ("a=0.25, b=1", {"a": 0.25, "b": 1.0}),
        (' {"a": 0.25, "b": 1}', {"a": 0.25, "b": 1.0}),
        ("a [of=words]=0.25,", {"a [of=words]": 0.25}),
    ],
)
def test_every_form_gives_floats_by_name(value: Any, expected: dict[str, float]) -> None:
    assert parse_mapping("thresholds", value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a", r"^t: expected a mapping of objective to number, or 'name=0\.45,other=0\.5'; got 'a'"),
        ("=0.5", "got '=0.5'"),
        ("a=high", "got 'high' for 'a'"),
        ("{", "got '{'"),
        ('{"a": {"b": 1}}', "for 'a'"),
        ([0.5], r"got \[0\.5\]"),
        ("a=inf", r"^t\['a'\]: expected a finite number; got 'inf'"),
        ("a=0.4,a=0.5", "^t: expected every objective once; got 'a' twice"),
        ('{"a": 0.4, "a": 0.5}', "^t: expected every objective once; got 'a' twice"),
    ],
)
def test_what_is_no_mapping_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mapping("t", value)


def test_repeated_options_are_joined() -> None:
    assert parse_mappings("--t", ["a=0.25", '{"b": 1}']) == {"a": 0.25, "b": 1.0}
    with pytest.raises(ValueError, match=r"^--t: expected every objective once; got 'a' twice"):
        parse_mappings("--t", ["a=0.25", "a=0.5"])


def test_the_module_needs_no_heavy_package() -> None:
    program = f"import runpy, sys; runpy.run_path({mappings.__file__!r})"
    program += "; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"
