"""What the Triton kernels compile to, without a GPU: no spills, shared memory that fits, nothing compiled anew.

Kernels are compiled in processes of their own: this one may interpret them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench import compile_report

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90, 100)
# Of every kernel the variant that takes most, and of the product also the one that is used most.
SAMPLE = (
    r"^(lse_fwd|logits_bwd) fp32 capped bias W=4099$"
    r"|^linear_lse_fwd bf16 (capped bias|plain) store H=1024 W=4096 "
    r"|^linear_lse_fwd bf16 capped bias store H=1040 W=4099 "
    r"|^exp_logits_bwd fp16 capped grad_logprob H=1024 W=4096 "
    r"|^(row_offset bf16 capped bias|mark_target bf16 capped) H=1024 W=4096 "
    r"|^(row_statistics bf16 any|scale_rows bf16 rows) H=1024 W=4096 "
    r"|^segment_sum fp32 int64$"
    r"|^(pair_loss_bwd|pair_loss_fwd|check_values) fp32 sigmoid pair_weight label_rate margin length normalizer "
    r"(tokens int64|snis|prompt_index target int64)$"
)


def run(program: list[str], tmp_path: Path) -> str:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Bytes a thread: eight registers. Which variants spill so few changes with the version of Triton.
LARGEST_STACK = 32


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What no kernel may do: spill more than a few registers, exceed a block's shared memory, draw ptxas' advice."""
    found = []
    for row in rows:
        name = f"sm_{row['architecture']} {row['kernel']} ({row['variants'][0]})"
        spilled = row["stack_bytes"] + row["spill_store_bytes"] + row["spill_load_bytes"]
        limit = 1024 * compile_report.SHARED_KIB[row["architecture"]]
        found += [f"{name}: {spilled} bytes of stack and spills"] * (row["stack_bytes"] > LARGEST_STACK)
        found += [f"{name}: {row['shared_bytes']} of {limit} bytes of shared memory"] * (row["shared_bytes"] > limit)
        found += [f"{name}: {advice}" for advice in row["advice"]]
    return found


def committed() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(compile_report.OUTPUT.read_text(encoding="utf-8"))
    return report


def test_the_committed_report_is_of_every_variant_of_todays_kernels() -> None:
    report = committed()
    assert report["sources"] == compile_report.source_hash(), "run python -m bench.compile_report"
    expected = set(compile_report.variants())
    for architecture in compile_report.ARCHITECTURES:
        rows = [row for row in report["rows"] if row["architecture"] == architecture]
        assert {name for row in rows for name in row["variants"]} == expected
        assert {row["kernel"] for row in rows} == {
            "lse_fwd",
            "logits_bwd",
            "linear_lse_fwd",
            "merge",
            "exp_logits_bwd",
            "row_offset",
            "merge_sums",
            "row_statistics",
            "mark_target",
            "bend",
            "scale_rows",
            "segment_sum",
            "pair_loss_bwd",
            "pair_loss_fwd",
            "check_values",
        }


def test_no_variant_in_the_committed_report_spills_or_takes_too_much_shared_memory() -> None:
    assert problems(committed()["rows"]) == []


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The sample, compiled now."""
    tmp_path = tmp_path_factory.mktemp("report")
    output = tmp_path / "report.json"
    arguments = ["--arch", *map(str, ARCHITECTURES), "--match", SAMPLE, "--output", str(output)]
    run(["-m", "bench.compile_report", *arguments], tmp_path)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def test_a_sample_compiled_now_neither_spills_nor_takes_too_much_shared_memory(fresh: dict[str, Any]) -> None:
    assert {row["architecture"] for row in fresh["rows"]} == set(ARCHITECTURES)
    assert len({row["kernel"] for row in fresh["rows"]}) == 14
    assert problems(fresh["rows"]) == []


def test_the_committed_report_says_what_the_sample_compiles_to(fresh: dict[str, Any]) -> None:
    report = committed()
    if fresh["triton"] != report["triton"]:
        pytest.skip(f"the report was made with triton {report['triton']}; here is {fresh['triton']}")

    def by_variant(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], set[str]]:
        """What is said of a variant's kernels, of those in both reports."""
        table: dict[tuple[Any, ...], set[str]] = {}
        for row in rows:
            said = json.dumps({key: value for key, value in row.items() if key not in ("variants", "compiled")})
            for variant in row["variants"]:
                table.setdefault((row["architecture"], variant), set()).add(said)
        return table

    old, new = by_variant(report["rows"]), by_variant(fresh["rows"])
    assert new
    assert {key: old.get(key) for key in new} == new


BROKEN = """
from bench.compile_report import compile_all
from mopo_kernels.backends.triton import linear_lse_fwd
import json
# Half the threads for the same block: twice the registers each. And more stages than shared memory has room for.
table = linear_lse_fwd.CONFIGURATIONS
table[80] = table[80]._replace(block_v=256)
table[90] = table[90]._replace(num_stages=6)
match = "^linear_lse_fwd bf16 plain H=1024 W=4096 "
print(json.dumps(compile_all(80, match) + compile_all(90, match)))
"""


def test_negative_control_a_block_too_large_is_noticed(tmp_path: Path) -> None:
    rows = json.loads(run(["-c", BROKEN], tmp_path).splitlines()[-1])
    found = problems([row for row in rows if row["kernel"] == "linear_lse_fwd"])
    assert any("sm_80" in line and "bytes of stack and spills" in line for line in found)
    assert any("sm_90" in line and "bytes of shared memory" in line for line in found)


BATCHES = """
import torch
from bench.compile_report import compiling
from mopo_kernels.arguments import CallValues, LogitTransform, LossOptions, PairBatch
from mopo_kernels.backends.triton.backend import BACKEND
from mopo_kernels.backends.triton.check_values import check_values

W, H, transform = 4096, 64, LogitTransform()
products, exp_logits = torch.zeros(300, W), torch.zeros(300, W, dtype=torch.bfloat16)
hidden, weight = exp_logits[:, :H].contiguous(), torch.zeros(W, H, dtype=torch.bfloat16)

def step(rows, start, sequences, pairs):
    # Slices that start anywhere, as those of a chunk's statistics do.
    target, double = (torch.zeros(400, dtype=d)[rows % 7 :][:rows] for d in (torch.int64, torch.float64))
    row, bias = torch.zeros(400)[rows % 5 :][:rows], torch.zeros(W + 9)[rows % 3 :][:W]
    offsets, half = torch.zeros(BACKEND.offset_blocks(W), rows), exp_logits[:rows].half()
    BACKEND.lse_fwd(products[:rows], bias, target, start, transform, row, row, row)
    BACKEND.logits_bwd_(products[:rows], bias, target, start, transform, double, row)
    at = bias, target, start, transform, row, row, row
    BACKEND.row_offset(hidden[:rows], weight, *at[:4])
    BACKEND.linear_lse_fwd(hidden[:rows], weight, *at, exp_logits[:rows])
    BACKEND.row_statistics(row, row, row, target, row, double)
    BACKEND.mark_target_(exp_logits[:rows], target, start, transform, row, double, row, row)
    BACKEND.scaled(hidden[:rows], row[:, None], torch.bfloat16)
    BACKEND.linear_lse_fwd(hidden[:rows].half(), weight.half(), *at, half, offsets)
    BACKEND.exp_logits_bwd_(half, offsets, target, start, transform, double, row, row)
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int64)
    BACKEND.segment_sum(row, cu_seqlens)
    one, each = torch.ones(sequences), torch.ones(pairs)
    batch = PairBatch(torch.zeros(pairs, 2, dtype=torch.int64), torch.zeros(pairs, 3), torch.ones(3), each, None, each,
                      one, None, torch.ones(()), LossOptions(loss_type="sigmoid"))
    BACKEND.pair_loss_bwd(one, one, batch)
    BACKEND.token_grad_logprob(one, one, batch, cu_seqlens, rows)
    BACKEND.pair_loss_fwd(one, one, batch)
    check_values(CallValues(target, start + 1, -start, cu_seqlens, rows, batch, sequences))

with compiling(90) as launched:
    step(300, 0, 16, 16)
    first = {kernel.key for kernel in launched}
    for rows, start, sequences, pairs in ((1, 1, 1, 1), (7, 16, 2, 3), (16, 4096, 5, 32), (256, 100_003, 40, 300)):
        launched.clear()
        step(rows, start, sequences, pairs)
        print(len(launched), len(first), len({kernel.key for kernel in launched} - first))
"""


def test_a_new_number_of_rows_sequences_or_pairs_compiles_nothing(tmp_path: Path) -> None:
    lines = run(["-c", BATCHES], tmp_path).splitlines()
    assert lines == ["16 16 0"] * 4


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ([], True),
        (["--match", "lse_fwd"], False),
        (["--arch", "90"], False),
        (["--match", "lse_fwd", "--output", "part.json"], True),
    ],
    ids=["whole", "match", "arch", "output"],
)
def test_a_part_of_the_report_does_not_replace_the_whole(
    arguments: list[str],
    written: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = []

    def compiled(architecture: int, match: str) -> list[dict[str, Any]]:
        asked.append(architecture)
        return [{"compiled": 3}]

    monkeypatch.setattr(compile_report, "compile_all", compiled)
    monkeypatch.setattr(compile_report, "show", lambda rows: None)
    monkeypatch.setattr(compile_report, "interpreted", lambda: False)
    monkeypatch.setattr(compile_report, "OUTPUT", tmp_path / "compile_report.json")
    monkeypatch.chdir(tmp_path)
    compile_report.main(arguments)
    name = "part.json" if "--output" in arguments else "compile_report.json"
    assert [path.name for path in tmp_path.iterdir()] == [name] * written
    assert asked == ([90] if "--arch" in arguments else list(compile_report.ARCHITECTURES))
    said = capsys.readouterr().out
    assert f"{3 * len(asked)} kernels compiled" in said
    assert (name in said) == written


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_report, "interpreted", lambda: False)
    with pytest.raises(SystemExit) as stop:
        compile_report.main(["--match", "segment_sum", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "--output: expected a file to write; got the folder" in capsys.readouterr().err


def test_interpreted_kernels_are_refused() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "bench.compile_report", "--list"]
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "TRITON_INTERPRET must not be set" in done.stderr
