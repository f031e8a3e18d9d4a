"""Tile work: every backend available here against plain PyTorch in fp64, and the C++ extension's build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import CPU_BACKENDS as BACKENDS
from tile_cases import (
    EVERYTHING,
    HEADS,
    PLAIN,
    SHAPES,
    START,
    answer,
    check_within_budget,
    logits,
    lse_fwd,
    make_case,
    plain,
)

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends import TileBackend, cpp, tile_backend
from mopo_kernels.backends.base import NOT_SCORED
from mopo_kernels.backends.torch_ops import TorchBackend

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=[f"{r}x{w}" for r, w in SHAPES])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_shape_matches_fp64(name: str, rows: int, width: int, dtype: torch.dtype) -> None:
    case = make_case(rows, width, bias=True, dtype=dtype)
    check_within_budget(answer(tile_backend(name), case, EVERYTHING), case, EVERYTHING, floor=3.0)


@pytest.mark.parametrize(("transform", "bias"), HEADS)
@pytest.mark.parametrize("name", BACKENDS)
def test_error_is_within_plain_pytorchs_for_every_head(name: str, transform: LogitTransform, bias: bool) -> None:
    # 130 rows are enough for a fair comparison; half an epsilon is what rounding the exact answer costs.
    case = make_case(130, 4099, bias)
    check_within_budget(answer(tile_backend(name), case, transform), case, transform, floor=0.5)


@pytest.mark.parametrize("name", BACKENDS)
def test_tiles_in_sequence_are_one_wide_tile(name: str) -> None:
    case = make_case(130, 4099, bias=True)
    # A single column, a ragged few, and a boundary inside the C++ kernel's second block.
    got = answer(tile_backend(name), case, EVERYTHING, cuts=(1, 66, 2900))
    check_within_budget(got, case, EVERYTHING, floor=0.5)


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(30.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_logits_stay_exact(name: str, transform: LogitTransform) -> None:
    case = make_case(130, 1000, bias=False, spread=1e4)
    got = answer(tile_backend(name), case, transform)
    assert all(torch.isfinite(part).all() for part in got)
    # At the cap the slope 1 - tanh^2 is 0 up to rounding, so that plain PyTorch's gradient is itself mostly rounding.
    check_within_budget(got, case, transform, floor=0.5, factor=2.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_outside_the_tile_is_read_or_written(name: str) -> None:
    backend, logsumexp = tile_backend(name), torch.zeros(5, dtype=torch.float64)
    results = []
    # NaN shows what is read, a number what is overwritten by something computed from it.
    for around in (torch.nan, 7.0):
        case = make_case(5, 70, bias=True)
        block = case.tile._base
        assert block is not None
        block.nan_to_num_(nan=around)
        before = block.clone()
        statistics = lse_fwd(backend, case, EVERYTHING)
        assert torch.equal(block.view(torch.int32), before.view(torch.int32)), "fold changed the tile"
        backend.logits_bwd_(case.tile, case.bias, case.target, START, EVERYTHING, logsumexp, case.grad_logprob)
        before[1:6, 3:73] = case.tile
        assert torch.equal(block.view(torch.int32), before.view(torch.int32)), "gradient_ wrote outside the tile"
        results.append((*statistics, case.tile))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("rows", "width"), [(1, 50_000), (130, 4099)], ids=["fewer_rows_than_threads", "many_rows"])
@pytest.mark.parametrize("name", BACKENDS)
def test_results_are_bitwise_the_same_for_any_number_of_threads(name: str, rows: int, width: int) -> None:
    case = make_case(rows, width, bias=True)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 2, 5):
            torch.set_num_threads(count)
            answers.append(answer(tile_backend(name), case, EVERYTHING))
    finally:
        torch.set_num_threads(threads)
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_no_coefficient_stands_for_one(name: str) -> None:
    case = make_case(5, 70, bias=False)
    backend, logsumexp = tile_backend(name), torch.full((5,), 9.0)
    without, ones = case.tile.clone(), case.tile.clone()
    backend.logits_bwd_(without, None, case.target, START, PLAIN, logsumexp, None)
    backend.logits_bwd_(ones, None, case.target, START, PLAIN, logsumexp, torch.ones(5))
    assert torch.equal(without, ones)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_token_that_is_not_scored_has_a_gradient_of_zero(name: str) -> None:
    """Whatever its products are: its statistics mean nothing."""
    case = make_case(5, 70, bias=True)
    target = case.target.clone()
    target[[0, 3]] = NOT_SCORED
    case.tile[0] = torch.nan
    kept = case.tile.clone()
    logsumexp = torch.full((5,), 9.0, dtype=torch.float64)
    tile_backend(name).logits_bwd_(case.tile, case.bias, target, START, EVERYTHING, logsumexp, case.grad_logprob)
    tile_backend(name).logits_bwd_(
        kept[1:3], case.bias, case.target[1:3], START, EVERYTHING, logsumexp[1:3], case.grad_logprob[1:3]
    )
    assert torch.equal(case.tile[[0, 3]], torch.zeros(2, 70))
    assert torch.equal(case.tile[1:3], kept[1:3])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_logit_is_not_lost(name: str) -> None:
    case = make_case(3, 70, bias=False)
    case.tile[1, 69] = torch.nan
    _, sum_exp, _ = lse_fwd(tile_backend(name), case, PLAIN)
    assert sum_exp.isnan().tolist() == [False, True, False]


class DropsLastColumn(TorchBackend):
    def lse_fwd(self, tile, bias, target, start, transform, row_max, sum_exp, target_logit):
        bias = None if bias is None else bias[:-1]
        super().lse_fwd(tile[:, :-1], bias, target, start, transform, row_max, sum_exp, target_logit)


class ForgetsTheSoftcapsSlope(TorchBackend):
    def logits_bwd_(self, tile, bias, target, start, transform, logsumexp, grad_logprob):
        z = logits(tile, bias, transform)
        tile.copy_(z)
        super().logits_bwd_(tile, None, target, start, PLAIN, logsumexp, grad_logprob)


@pytest.mark.parametrize("broken", [DropsLastColumn(), ForgetsTheSoftcapsSlope()], ids=lambda b: type(b).__name__)
def test_negative_control_a_wrong_backend_exceeds_the_budget(broken: TileBackend) -> None:
    case = make_case(130, 4099, bias=True)
    with pytest.raises(AssertionError, match=r"error .* against fp64"):
        check_within_budget(answer(broken, case, EVERYTHING), case, EVERYTHING, floor=3.0)


# What only the C++ backend promises.

needs_cpp = pytest.mark.parametrize("name", [name for name in BACKENDS if name == "cpp"])


@needs_cpp
def test_cpp_takes_a_tile_whose_logits_are_all_minus_infinity(name: str) -> None:
    case = make_case(3, 70, bias=True)
    assert case.bias is not None
    case.bias[:40] = -torch.inf
    wide, parts = lse_fwd(tile_backend(name), case, PLAIN), lse_fwd(tile_backend(name), case, PLAIN, cuts=(40,))
    truth = plain(case, PLAIN, torch.float64).logsumexp
    for row_max, sum_exp, _ in (wide, parts):
        torch.testing.assert_close((row_max + sum_exp.log()).double(), truth, rtol=1e-6, atol=0)


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_cpp_is_within_budget_on_every_instruction_set(name: str, capability: str, tmp_path: Path) -> None:
    # A processor without an instruction set takes the best one it has. Without fused multiply-add ("default") the
    # corrections inside tanh are themselves rounded: one epsilon of a logit instead of a half.
    script = (
        "import tile_cases as t, torch\n"
        "from mopo_kernels.backends import tile_backend\n"
        "for mark in t.HEADS:\n"
        "    transform, bias = mark.values\n"
        "    case = t.make_case(130, 4099, bias)\n"
        "    t.check_within_budget(t.answer(tile_backend('cpp'), case, transform), case, transform, floor=1.0)\n"
        "print('capability', torch.backends.cpu.get_cpu_capability())\n"
    )
    best = ["DEFAULT", "AVX2", "AVX512"].index(torch.backends.cpu.get_cpu_capability())
    wanted = min(best, ["default", "avx2", "avx512"].index(capability))
    env = {**os.environ, "ATEN_CPU_CAPABILITY": ["default", "avx2", "avx512"][wanted]}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["capability", ["DEFAULT", "AVX2", "AVX512"][wanted]]


@needs_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": torch.zeros(3, 4, dtype=torch.bfloat16)}, "tile: expected float32 or float64; got BFloat16"),
        ({"tile": torch.zeros(4, 3).T}, r"column stride 1 .* got shape \[3, 4\], strides \[1, 3\]"),
        ({"tile": torch.zeros(3)}, r"tile: expected a CPU tensor of shape \(rows, columns\); got shape \[3\]"),
        ({"bias": torch.zeros(5)}, r"bias: expected a CPU tensor of shape \(4,\) .* got shape \[5\]"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"target: expected .* shape \(3,\) .* got shape \[2\]"),
        ({"target": torch.zeros(3)}, "target: expected .* dtype Long .* dtype Float"),
        ({"sum_exp": torch.zeros(6)[::2]}, r"sum_exp: expected a contiguous .* strides \[2\]"),
        ({"row_max": torch.zeros(3, dtype=torch.float64)}, "row_max: expected .* dtype Float .* dtype Double"),
        ({"transform": LogitTransform(-1.0, 1.0, 1.0)}, "softcap: expected a positive finite number; got -1"),
        ({"transform": LogitTransform(None, float("nan"), 1.0)}, "logit_scale: expected a finite number; got nan"),
        ({"transform": LogitTransform(None, 1.0, 0.0)}, "temperature: expected a positive finite number; got 0"),
    ],
)
def test_cpp_errors_name_the_argument_and_the_value(name: str, change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "tile": torch.zeros(3, 4),
        "bias": None,
        "target": torch.zeros(3, dtype=torch.int64),
        "start": 0,
        "transform": PLAIN,
        "row_max": torch.zeros(3),
        "sum_exp": torch.zeros(3),
        "target_logit": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=message):
        tile_backend(name).lse_fwd(**{**arguments, **change})


# The build: a package without the extension works and says why.


# A compiler that tells its version and compiles nothing.
BROKEN = "broken-c++"


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py as an install would, with the package going to ``tmp_path``."""
    package = tmp_path / "mopo_kernels"
    shutil.copytree(ROOT / "mopo_kernels", package, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    if env.get("CXX") == BROKEN:
        compiler = tmp_path / BROKEN
        compiler.write_text(
            '#!/bin/sh\ncase "$*" in *-c\\ *) echo "no such header" >&2; exit 1;; esac\nexec c++ "$@"\n'
        )
        compiler.chmod(0o755)
        env["CXX"] = str(compiler)
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "MOPO_BUILD")}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "t"),
    ]
    return subprocess.run(command, env={**clean, **env}, cwd=ROOT, capture_output=True, text=True)


def reason_in(tmp_path: Path) -> str:
    script = (
        "import torch, mopo_kernels.backends as b\n"
        "assert b.resolve('auto', torch.device('cpu')) == 'torch'\n"
        "print(b.__file__)\n"
        "print(b.availability()['cpp'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, *reason = done.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert len(reason) == 1
    return reason[0]


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"MOPO_BUILD": "0"}, "MOPO_BUILD=0 was set at install time; reinstall with MOPO_BUILD=cpu"),
        (
            {"PATH": "/nowhere"},
            "no C++ compiler was found at install time (looked for 'c++'); install one and reinstall",
        ),
        ({"CXX": BROKEN}, "the build failed at install time (Error compiling objects for extension)"),
    ],
    ids=["switched_off", "no_compiler", "broken_compiler"],
)
def test_a_package_without_the_extension_works_and_says_why(tmp_path: Path, env: dict[str, str], expected: str) -> None:
    done = build(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert f"mopo_kernels: installing without the C++ extension: {expected}" in done.stderr
    reason = reason_in(tmp_path)
    assert reason.startswith(f"the C++ extension was not built: {expected}")
    assert "reinstall with MOPO_BUILD=cpu" in reason


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"PATH": "/nowhere", "MOPO_BUILD": "cpu"}, "MOPO_BUILD=cpu, but no C++ compiler was found"),
        ({"CXX": BROKEN, "MOPO_BUILD": "cpu"}, "Error compiling objects for extension"),
        ({"MOPO_BUILD": "gpu"}, "MOPO_BUILD: expected one of auto, cuda, cpu, 0; got 'gpu'"),
    ],
    ids=["no_compiler", "broken_compiler", "unknown_mode"],
)
def test_a_build_that_was_asked_for_and_fails_stops_the_install(
    tmp_path: Path, env: dict[str, str], expected: str
) -> None:
    done = build(tmp_path, **env)
    assert done.returncode != 0
    assert expected in done.stderr


def test_an_extension_of_another_torch_says_so(tmp_path: Path) -> None:
    build(tmp_path, MOPO_BUILD="0")
    package = tmp_path / "mopo_kernels"
    (package / "_build.json").write_text(json.dumps({"reason": None, "torch": "1.0"}))
    (package / "_C.py").write_text("raise ImportError('undefined symbol:\\n_ZN3c10')")
    reason = reason_in(tmp_path)
    assert reason.startswith("the C++ extension was built with torch 1.0 and does not load with torch ")
    assert "(undefined symbol: _ZN3c10)" in reason


def test_the_extension_loads_where_it_was_built() -> None:
    record = Path(cpp.__file__).parent.parent / "_build.json"
    built = record.exists() and json.loads(record.read_text())["reason"] is None
    assert (cpp.unavailable_reason() is None) == built
