"""What is installed is what the lock says; the lock is within the ranges of pyproject.toml, which have two ends."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Extras that `make install` leaves out: another optimiser's, and what stands in requirements/no_deps.txt.
NOT_LOCKED = ("lean", "peers")
# What `make install` put where this interpreter is.
INSTALLED = Path(sys.prefix) / "lock.txt"


def requirements(file: Path) -> list[Requirement]:
    lines = (line.partition("  #")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins(file: Path, **environment: str) -> dict[str, str]:
    """Version by name, of the lines that apply here, or to the environment that is given."""
    found: dict[str, str] = {}
    for requirement in requirements(file):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            assert requirement.name not in found
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def ranges() -> Iterator[tuple[str, Requirement]]:
    """Where each range stands, and it."""
    project = PROJECT["project"]
    yield from (("dependencies", Requirement(line)) for line in project["dependencies"])
    for extra, lines in project["optional-dependencies"].items():
        yield from ((extra, Requirement(line)) for line in lines)
    for group, lines in PROJECT["dependency-groups"].items():
        yield from ((group, Requirement(line)) for line in lines)
    yield from (("build-system", Requirement(line)) for line in PROJECT["build-system"]["requires"])


def test_what_is_installed_is_what_the_lock_says() -> None:
    """Packages that neither the lock nor the project knows are whoever's added them."""
    if not INSTALLED.exists() or not INSTALLED.read_text():
        pytest.skip("this environment was not made from a lock: `make install` makes one that is")
    locked = pins(INSTALLED) | pins(ROOT / "requirements" / "no_deps.txt")
    # Without local parts: which build of torch it is, the lock leaves open.
    # Not of sys.path, to which setuptools adds what it brings along.
    places = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    found: dict[str, str] = {
        canonicalize_name(one.name): one.version.partition("+")[0] for one in metadata.distributions(path=places)
    }
    assert {name: found[name] for name in locked.keys() & found.keys() if found[name] != locked[name]} == {}
    needed = {
        canonicalize_name(requirement.name)
        for place, requirement in ranges()
        if place not in ("lean", "qlora", "docs") and (requirement.marker is None or requirement.marker.evaluate())
    }
    assert needed <= locked.keys() & found.keys()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_lock_is_within_every_range(python: str, platform: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": platform}
    locked = pins(ROOT / "requirements" / "lock.txt", **environment)
    checked = 0
    for place, requirement in ranges():
        applies = requirement.marker is None or requirement.marker.evaluate(environment)
        if place not in NOT_LOCKED and applies:
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{place}: {requirement} has {version}"
            checked += 1
    assert checked > 20


def test_no_held_version_is_locked() -> None:
    locked = pins(ROOT / "requirements" / "lock.txt")
    for held in requirements(ROOT / "requirements" / "held.txt"):
        assert held.specifier.contains(locked[canonicalize_name(held.name)])


def test_every_range_has_two_ends() -> None:
    for place, requirement in ranges():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators in ({">=", "<"}, {"=="}), f"{place}: {requirement}"


def test_what_stands_twice_is_the_same() -> None:
    by_place: dict[str, dict[str, str]] = {}
    for place, requirement in ranges():
        by_place.setdefault(place, {})[requirement.name] = str(requirement.specifier)
    runtime = by_place["build-system"].pop("torch")
    assert runtime == by_place["dependencies"]["torch"]
    assert by_place["build-system"].items() <= by_place["build"].items()
    assert by_place["bench"].items() <= by_place["test"].items()
    no_deps = {one.name: str(one.specifier) for one in requirements(ROOT / "requirements" / "no_deps.txt")}
    assert no_deps.items() >= by_place["peers"].items()
