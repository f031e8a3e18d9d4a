"""The CUDA backend, run: its source on the CPU through tests/helpers/cuda_emulator, and on a GPU where one is found,
against plain PyTorch in fp64 on the same grid as every other backend."""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from tile_cases import (
    EVERYTHING,
    HEADS,
    PLAIN,
    SHAPES,
    START,
    Case,
    answer,
    check_within_budget,
    lse_fwd,
    make_case,
    plain,
)
from torch import Tensor
from torch.utils.cpp_extension import TORCH_LIB_PATH, get_cxx_compiler, include_paths

from mopo_kernels.arguments import LogitTransform
from mopo_kernels.backends import TileBackend, cuda

EMULATOR = Path(__file__).resolve().parents[1] / "helpers" / "cuda_emulator"
COMPILER = shlex.split(get_cxx_compiler())
# Columns that one block takes of a row in one pass of fold, and in all of gradient_.
STRETCH = {torch.float32: 4096, torch.float64: 2048}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def compile_emulated(source: str, output: Path, *flags: str) -> Path:
    if sys.platform != "linux":
        pytest.skip("the emulator needs Linux: it finds shared memory by its ELF section")
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler was found (looked for {COMPILER[0]!r})")
    command = [*COMPILER, str(EMULATOR / source), "-o", str(output), "-std=c++20", f"-I{EMULATOR}"]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


class EmulatedBackend(TileBackend):
    """csrc/cuda compiled for the CPU: checks, launches and kernels."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.set_thread_order = ctypes.CDLL(str(library)).set_thread_order
        self.key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def lse_fwd(self, tile, bias, target, start, transform, row_max, sum_exp, target_logit):
        operator = torch.ops.mopo_tile_emulated.lse_fwd.default
        operator.redispatch(self.key, tile, bias, target, start, *transform.flatten(), row_max, sum_exp, target_logit)

    def logits_bwd_(self, tile, bias, target, start, transform, logsumexp, grad_logprob):
        operator = torch.ops.mopo_tile_emulated.logits_bwd_.default
        operator.redispatch(self.key, tile, bias, target, start, *transform.flatten(), logsumexp, grad_logprob)


class OnDevice(TileBackend):
    """Takes CPU tensors to a device, in storage of the same layout and alignment, and what is there afterwards back."""

    def __init__(self, backend: TileBackend, device: str) -> None:
        self.backend, self.device = backend, device

    def call(self, name: str, *arguments: object) -> None:
        there = []
        for value in arguments:
            if isinstance(value, Tensor):
                whole = torch.empty(0, dtype=value.dtype, device=self.device)
                storage = value.untyped_storage().to(device=torch.device(self.device))
                value = whole.set_(storage, value.storage_offset(), value.shape, value.stride())
            there.append(value)
        getattr(self.backend, name)(*there)
        for value, moved in zip(arguments, there, strict=True):
            if isinstance(value, Tensor) and isinstance(moved, Tensor):
                value.untyped_storage().copy_(moved.untyped_storage())

    def lse_fwd(self, *arguments):
        self.call("lse_fwd", *arguments)

    def logits_bwd_(self, *arguments):
        self.call("logits_bwd_", *arguments)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedBackend:
    includes = [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_path("include")]]
    library = compile_emulated(
        "emulated.cpp",
        tmp_path_factory.mktemp("emulated") / "emulated.so",
        # As on a GPU, a product and a sum are rounded once.
        *("-O2", "-march=native", "-ffp-contract=fast", "-fvisibility=hidden", "-shared", "-fPIC", *includes),
        *(f"-L{TORCH_LIB_PATH}", "-lc10", "-ltorch_cpu", "-ltorch"),
    )
    return EmulatedBackend(library)


GPU = [pytest.param("gpu", marks=pytest.mark.gpu)] if cuda.unavailable_reason() is None else []


@pytest.fixture(scope="module", params=["emulated", *GPU])
def backend(request: pytest.FixtureRequest) -> TileBackend:
    if request.param == "gpu":
        return OnDevice(cuda.BACKEND, "cuda")
    chosen: TileBackend = request.getfixturevalue("emulated")
    return chosen


def unaligned_case(offset: int, width: int, stride: int, dtype: torch.dtype, rows: int = 5) -> Case:
    """A tile that starts ``offset`` elements past a 16-byte boundary, in NaN."""
    case = make_case(rows, width, bias=True, dtype=dtype)
    storage = torch.full((64 + offset + rows * stride,), torch.nan, dtype=dtype)
    start = (-storage.data_ptr() // storage.element_size()) % (16 // storage.element_size()) + offset
    tile = storage[start:].as_strided((rows, width), (stride, 1))
    assert tile.data_ptr() % 16 == offset * storage.element_size()
    return case._replace(tile=tile.copy_(case.tile))


@DTYPES
@pytest.mark.parametrize(("rows", "width"), SHAPES, ids=[f"{r}x{w}" for r, w in SHAPES])
def test_every_shape_matches_fp64(backend: TileBackend, rows: int, width: int, dtype: torch.dtype) -> None:
    case = make_case(rows, width, bias=True, dtype=dtype)
    check_within_budget(answer(backend, case, EVERYTHING), case, EVERYTHING, floor=3.0)


@pytest.mark.parametrize(("transform", "bias"), HEADS)
def test_error_is_within_plain_pytorchs_for_every_head(
    backend: TileBackend, transform: LogitTransform, bias: bool
) -> None:
    case = make_case(130, 4099, bias)
    check_within_budget(answer(backend, case, transform), case, transform, floor=0.5)


@DTYPES
@pytest.mark.parametrize("offset", range(4))
def test_rows_may_start_at_any_element(backend: TileBackend, offset: int, dtype: torch.dtype) -> None:
    # Widths of scalars only, of one vector and scalars on both sides, of one stretch and more; strides that move the
    # boundary from row to row, or leave it; the first equal to the width.
    for width, gap in itertools.product((1, 2, 5, 11, 70, STRETCH[dtype] + 1), range(4)):
        lanes = 16 // dtype.itemsize
        case = unaligned_case(offset % lanes, width, width + gap, dtype)
        check_within_budget(answer(backend, case, EVERYTHING), case, EVERYTHING, floor=3.0)


@DTYPES
@pytest.mark.parametrize("offset", range(4))
def test_the_target_may_be_any_column(backend: TileBackend, offset: int, dtype: torch.dtype) -> None:
    stretch, lanes = STRETCH[dtype], 16 // dtype.itemsize
    width = 2 * stretch + 9
    # Around the first and last boundary of a vector, of the stretches and of a warp.
    at = [*range(9), 127, 128, *range(stretch - 5, stretch + 5), *range(2 * stretch - 5, width)]
    case = unaligned_case(offset % lanes, width, width + lanes, dtype, rows=len(at))
    case.target.copy_(START + torch.tensor(at))
    check_within_budget(answer(backend, case, PLAIN), case, PLAIN, floor=3.0)


def test_tiles_in_sequence_are_one_wide_tile(backend: TileBackend) -> None:
    case = make_case(130, 4099, bias=True)
    got = answer(backend, case, EVERYTHING, cuts=(1, 66, 2900))
    check_within_budget(got, case, EVERYTHING, floor=0.5)


# In one tile; and in three, of which the last does not hold the largest logit.
@pytest.mark.parametrize("cuts", [(), (300, 999)], ids=["one", "three"])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(30.0)], ids=["plain", "softcap"])
def test_extreme_logits_stay_exact(backend: TileBackend, transform: LogitTransform, cuts: tuple[int, ...]) -> None:
    case = make_case(130, 1000, bias=False, spread=1e4)
    got = answer(backend, case, transform, cuts)
    assert all(torch.isfinite(part).all() for part in got)
    check_within_budget(got, case, transform, floor=0.5, factor=2.0)


@DTYPES
def test_the_targets_gradient_keeps_its_digits_where_it_is_nearly_certain(
    backend: TileBackend, dtype: torch.dtype
) -> None:
    tile = torch.zeros(1, 70, dtype=dtype)
    tile[0, 20] = 16.0
    logsumexp = torch.logsumexp(tile.double(), dim=1)
    expected = -torch.expm1(16.0 - logsumexp)
    backend.logits_bwd_(tile, None, torch.tensor([START + 20]), START, PLAIN, logsumexp, None)
    torch.testing.assert_close(tile[:, 20].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", range(4))
def test_nothing_outside_the_tile_is_read_or_written(backend: TileBackend, offset: int) -> None:
    results = []
    # NaN shows what is read, a number what is overwritten by something computed from it.
    for around in (torch.nan, 7.0):
        case = unaligned_case(offset, 70, 75, torch.float32)
        block = case.tile._base
        assert block is not None
        inside = torch.zeros_like(block, dtype=torch.bool)
        first = case.tile.storage_offset()
        inside[first:].as_strided((5, 70), (75, 1)).fill_(True)
        block.masked_fill_(~inside, around)
        before = block.clone()
        statistics = lse_fwd(backend, case, EVERYTHING)
        assert torch.equal(block.view(torch.int32), before.view(torch.int32)), "fold changed the tile"
        logsumexp = torch.zeros(5, dtype=torch.float64)
        backend.logits_bwd_(case.tile, case.bias, case.target, START, EVERYTHING, logsumexp, case.grad_logprob)
        changed = block.view(torch.int32) != before.view(torch.int32)
        assert torch.equal(changed, inside), "gradient_ wrote outside the tile or left some of it"
        results.append((*statistics, case.tile))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DTYPES
def test_unscored_rows_are_zeros_and_are_not_picked(backend: TileBackend, dtype: torch.dtype) -> None:
    for width in (1, 70, 2 * STRETCH[dtype] + 9):
        case = unaligned_case(1, width, width + 3, dtype)
        case.target[:] = torch.tensor([-1, START, -100, START + width - 1, -1])
        unscored = case.target < 0
        clean = answer(backend, case, EVERYTHING)
        case.tile[0], case.tile[2, 0], case.tile[4, -1] = torch.nan, torch.inf, torch.nan
        target_logit = torch.full((5,), 7.0, dtype=dtype)
        row_max, sum_exp = torch.full((5,), -torch.inf, dtype=dtype), torch.zeros(5, dtype=dtype)
        # From column 0, where -1 is the column before the first.
        backend.lse_fwd(
            case.tile, case.bias, case.target - START * ~unscored, 0, EVERYTHING, row_max, sum_exp, target_logit
        )
        assert torch.equal(target_logit == 7.0, unscored)
        logsumexp = clean.logsumexp.double().masked_fill(unscored, torch.nan)
        grad_logprob = case.grad_logprob.masked_fill(unscored, torch.inf)
        backend.logits_bwd_(case.tile, case.bias, case.target, START, EVERYTHING, logsumexp, grad_logprob)
        assert torch.equal(case.tile[unscored], torch.zeros_like(case.tile[unscored]))
        torch.testing.assert_close(case.tile[~unscored], clean.gradient[~unscored], rtol=1e-5, atol=1e-6)


@DTYPES
def test_a_tile_may_be_all_minus_infinity(backend: TileBackend, dtype: torch.dtype) -> None:
    case = make_case(3, 70, bias=True, dtype=dtype)
    assert case.bias is not None
    case.bias[:40] = -torch.inf
    case.tile[2] = -torch.inf
    truth = plain(case, PLAIN, torch.float64).logsumexp
    for cuts in ((), (40,), (1, 39, 69)):
        row_max, sum_exp, _ = lse_fwd(backend, case, PLAIN, cuts)
        assert (row_max[2], sum_exp[2]) == (-torch.inf, 0.0)
        torch.testing.assert_close((row_max + sum_exp.log()).double(), truth, rtol=1e-6, atol=0)
    # A column of probability 0 has gradient 0, whatever the other rows hold.
    gradient = case.tile[:2].clone()
    backend.logits_bwd_(gradient, case.bias, case.target[:2] + 70, START, PLAIN, truth[:2], None)
    assert torch.equal(gradient[:, :40], torch.zeros(2, 40, dtype=dtype))
    assert torch.isfinite(gradient).all()


def test_a_nan_logit_is_not_lost(backend: TileBackend) -> None:
    # In the scalars of a row, in its vectors, and as the only logit.
    for width, column in ((70, 69), (70, 20), (1, 0)):
        case = make_case(3, width, bias=False)
        case.tile[1, column] = torch.nan
        _, sum_exp, _ = lse_fwd(backend, case, PLAIN)
        assert sum_exp.isnan().tolist() == [False, True, False]


def test_no_coefficient_stands_for_one(backend: TileBackend) -> None:
    case = make_case(5, 70, bias=False)
    logsumexp = torch.full((5,), 9.0)
    without, ones = case.tile.clone(), case.tile.clone()
    backend.logits_bwd_(without, None, case.target, START, PLAIN, logsumexp, None)
    backend.logits_bwd_(ones, None, case.target, START, PLAIN, logsumexp, torch.ones(5))
    assert torch.equal(without, ones)


def test_the_bias_is_cast_to_the_tiles_dtype(backend: TileBackend) -> None:
    case = make_case(5, 70, bias=True)
    assert case.bias is not None
    half = case.bias.bfloat16()
    expected = lse_fwd(backend, case._replace(bias=half.float()), PLAIN)
    assert all(
        torch.equal(a, b) for a, b in zip(lse_fwd(backend, case._replace(bias=half), PLAIN), expected, strict=True)
    )


@DTYPES
@pytest.mark.parametrize("width", [70, 9001])
def test_two_runs_are_bitwise_equal(backend: TileBackend, width: int, dtype: torch.dtype) -> None:
    case = unaligned_case(1, width, width + 1, dtype, rows=9)
    first, second = answer(backend, case, EVERYTHING), answer(backend, case, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What can be seen only where the source is emulated.


@DTYPES
@pytest.mark.parametrize("width", [70, 9001])
def test_the_order_in_which_threads_run_does_not_matter(
    emulated: EmulatedBackend, width: int, dtype: torch.dtype
) -> None:
    case = unaligned_case(1, width, width + 1, dtype, rows=9)
    case.target[0] = -1
    forward = answer(emulated, case, EVERYTHING)
    emulated.set_thread_order(True)
    try:
        backward = answer(emulated, case, EVERYTHING)
    finally:
        emulated.set_thread_order(False)
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_row_offsets_are_64_bit(emulated: EmulatedBackend, tmp_path: Path) -> None:
    # A sparse file: only the rows' own pages are ever there.
    stride = 2**31 + 5
    whole = torch.from_file(str(tmp_path / "tile"), shared=True, size=stride + 100)
    case = make_case(2, 70, bias=True)
    expected = answer(emulated, case, EVERYTHING)
    far = case._replace(tile=whole.as_strided((2, 70), (stride, 1)).copy_(case.tile))
    row_max, sum_exp, target_logit = lse_fwd(emulated, far, EVERYTHING)
    emulated.logits_bwd_(far.tile, far.bias, far.target, START, EVERYTHING, expected.logsumexp, far.grad_logprob)
    torch.testing.assert_close(row_max + sum_exp.log(), expected.logsumexp)
    torch.testing.assert_close((target_logit, far.tile), (expected.target_logit, expected.gradient))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": torch.zeros(3, 4, dtype=torch.bfloat16)}, "tile: expected float32 or float64; got BFloat16"),
        ({"tile": torch.zeros(4, 3).T}, r"column stride 1 .* got shape \[3, 4\], strides \[1, 3\]"),
        ({"tile": torch.zeros(3, 4, device="meta")}, r"shape \(rows, columns\); got shape \[3, 4\] on meta"),
        ({"bias": torch.zeros(5)}, r"bias: expected .* shape \(4,\) .* got shape \[5\]"),
        ({"target": torch.zeros(3, dtype=torch.int64, device="meta")}, "target: expected .* on cpu; got .* on meta"),
        ({"row_max": torch.zeros(3, dtype=torch.float64)}, "row_max: expected .* dtype Float .* dtype Double"),
        ({"transform": LogitTransform(0.0)}, "softcap: expected a positive finite number; got 0"),
    ],
)
def test_errors_name_the_argument_and_the_value(
    emulated: EmulatedBackend, change: dict[str, object], message: str
) -> None:
    rows = {name: torch.zeros(3) for name in ("row_max", "sum_exp", "target_logit")}
    arguments = {"tile": torch.zeros(3, 4), "bias": None, "target": torch.zeros(3, dtype=torch.int64), "start": 0}
    with pytest.raises(ValueError, match=message):
        emulated.lse_fwd(**{**arguments, "transform": PLAIN, **rows, **change})


def test_a_launch_that_fails_is_an_error(emulated: EmulatedBackend, tmp_path: Path) -> None:
    # More stretches of a row than a grid has blocks in y. The file is sparse, and nothing of it is read.
    width = 65536 * STRETCH[torch.float32]
    tile = torch.from_file(str(tmp_path / "tile"), shared=True, size=width)[None]
    with pytest.raises(RuntimeError, match="CUDA error"):
        emulated.logits_bwd_(tile, None, torch.zeros(1, dtype=torch.int64), 0, PLAIN, torch.zeros(1), None)


# Negative controls.


class DropsLastColumn(OnDevice):
    def lse_fwd(self, tile, bias, *rest):
        self.backend.lse_fwd(tile[:, :-1], None if bias is None else bias[:-1], *rest)


class TakesTheTargetForAnyOther(OnDevice):
    def logits_bwd_(self, tile, bias, target, *rest):
        self.backend.logits_bwd_(tile, bias, target.clamp(max=START - 1), *rest)


@pytest.mark.parametrize("defect", [DropsLastColumn, TakesTheTargetForAnyOther])
def test_negative_control_a_wrong_backend_exceeds_the_budget(backend: TileBackend, defect: type[OnDevice]) -> None:
    case = make_case(130, 4099, bias=True)
    with pytest.raises(AssertionError, match=r"error .* against fp64"):
        check_within_budget(answer(defect(backend, "cpu"), case, EVERYTHING), case, EVERYTHING, floor=3.0)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if shutil.which(COMPILER[0]) is not None:
        command = [*COMPILER, *sanitize, str(empty), "-o", str(folder / "empty")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"{COMPILER[0]} has no address and undefined behaviour sanitizers: {done.stderr[:200]}")
    return compile_emulated("checks.cpp", folder / "checks", "-O1", "-g", *sanitize)


def run_checks(program: Path, what: str) -> subprocess.CompletedProcess[str]:
    # The leak checker needs to trace the process, which containers forbid; everything ends with the process anyway.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(program), what], env=env, capture_output=True, text=True)


def test_kernels_pass_the_sanitizers(checks: Path) -> None:
    done = run_checks(checks, "tile")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("defect", "expected"),
    [
        ("divergent_barrier", "do not meet"),
        ("divergent_shuffle", "do not meet"),
        ("unwritten_shared", "nan"),
        ("overrun", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_negative_control_the_emulator_sees_defects(checks: Path, defect: str, expected: str) -> None:
    done = run_checks(checks, defect)
    assert expected in done.stdout + done.stderr


def test_negative_control_a_missing_barrier_changes_the_result(checks: Path) -> None:
    forward, backward = run_checks(checks, "missing_barrier").stdout.split()
    assert forward != backward
