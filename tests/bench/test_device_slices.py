"""The slices of ``make device`` for a borrowed card: each runs dry on the CPU, and one bad piece costs one entry."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import implementations as registry
from bench.device import __main__ as suite
from bench.device import building, peers, probing, stepping, subprocesses, testing, timing, wheels
from bench.device.record import NotHere, Record, Section
from mopo_kernels import backends

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def section(tmp_path: Path) -> Section:
    return Section(Record(tmp_path / "run.json", {"device": {"name": "a processor"}}), "cpu", 60.0, {})


def written(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


# ------------------------------------------------------------------------------------------------------- dry runs


def dry_run(name: str, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """What a slice leaves in the folder that OUT names, run as it is typed but on the CPU; here it touches nothing."""

    def here() -> dict[Path, int]:
        places = [*(ROOT / "bench" / "results").iterdir(), *(ROOT / "mopo_kernels").glob("_*")]
        return {path: path.stat().st_mtime_ns for path in places if path.is_file()}

    before = here()
    done = subprocess.run(
        [sys.executable, "-m", "bench.device", name, "--device", "cpu", "--commit", "abc"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert here() == before
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(rf"device_{name}_[a-z0-9_]+\.json", path.name)
    data = written(path)
    assert data["commit"] == "abc"
    assert data["command"] == f"python -m bench.device {name} --budget {suite.SLICES[name].budget:g}"
    assert data["seconds"] < suite.SLICES[name].budget
    return data


def test_smoke_runs_dry(tmp_path: Path) -> None:
    data = dry_run("smoke", tmp_path)
    assert list(data["sections"]) == ["tests", "tune", "probe"]
    assert data["peers"] == {"reason": "no section runs any"}
    probe = data["sections"]["probe"]
    assert (probe["failed"], probe["not_reached"]) == ({}, [])
    found = {figure["piece"]: figure for figure in probe["figures"]}
    assert list(found) == list(probing.Probe("cpu").pieces)
    assert all(value > 0 for name, value in found["ceilings"].items() if name != "piece")
    calls = [name for name in found if name.startswith("call")]
    assert [name.rpartition(", ")[2] for name in calls] == ["256 MiB", "512 MiB", "1024 MiB"]
    if backends.availability().get("triton", "not registered") is None:
        assert data["sections"]["tests"]["counts"] == {"passed": 1, "not run": 0}
        assert any(name.startswith("kernels") for name in found)


def test_full_runs_dry(tmp_path: Path) -> None:
    # Triton's interpreter would take a minute, and peers take seconds to import.
    folder = tmp_path / "peers"
    folder.mkdir()
    for peer in ("trl", "liger_kernel", "cut_cross_entropy"):
        (folder / f"{peer}.py").write_text("raise ImportError('not now')\n")
    (out := tmp_path / "out").mkdir()
    data = dry_run("full", out, TRITON_INTERPRET="0", PYTHONPATH=str(folder))
    assert {name: found["outcome"] for name, found in data["sections"].items()} == dict.fromkeys(
        ("tests", "build", "time"), "passed"
    )
    counts = data["sections"]["tests"]["counts"]
    assert counts["passed"] >= 2
    assert counts["not run"] == 0
    assert data["sections"]["build"]["backends"]["torch"] is None
    (shape,) = data["sections"]["time"]["shapes"].values()
    assert shape["unavailable"]["Liger DPO, scored rows"].endswith("not now")


def test_step_runs_dry(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = dry_run("step", tmp_path)
    found = data["sections"]["step"]
    sdpa = [one.name for one in stepping.RUNS if one.attention == "sdpa"]
    assert list(found["results"]) == sdpa
    assert found["unavailable"].keys() == {one.name for one in stepping.RUNS} - {*sdpa}
    for name, row in found["results"].items():
        assert row["steps"] == 2 * stepping.ROUNDS["cpu"]
        assert len(row["by_round"]) == 2
        assert row["first"]["loss"] == pytest.approx(math.log(2), rel=1e-4)
        assert row["over_TRL"] == pytest.approx(1.0) or not name.endswith("TRL, fastest, sdpa")
    for tuning in ("LoRA", "full"):
        ours, theirs = (found["results"][f"{tuning}, {name}, sdpa"] for name in (stepping.OURS, stepping.THEIRS))
        assert ours["first"]["rows"] == theirs["first"]["rows"]
        assert ours["first"]["grad_norm"] == pytest.approx(theirs["first"]["grad_norm"], rel=1e-4)
        assert ours["trained"] == theirs["trained"]
    assert found["results"]["full, mopo_kernels, sdpa"]["trained"] > found["results"][sdpa[0]]["trained"]


# ------------------------------------------------------------------------------------------------------- the command


def test_slices_are_choices_of_sections_within_a_lease() -> None:
    budgets = {name: suite.parse([name]).budget for name in suite.SLICES}
    assert budgets == {"smoke": 190, "compare": 140, "full": 280, "step": 180}
    assert suite.parse(["full"]).sections == ["tests", "time"]
    assert suite.parse(["full", "--budget", "100"]).budget == 100
    assert {name for one in suite.SLICES.values() for name in one.sections} <= suite.SECTIONS.keys()
    assert len(timing.SHAPES[: suite.SLICES["full"].sections["time"][1]["most"]]) == 4
    assert suite.SLICES["smoke"].sections["tests"][1] == {"stages": ("parity",), "workers": 12}
    with pytest.raises(SystemExit):
        suite.parse(["smoke", "--only", "time"])


def test_runs_do_not_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = "NVIDIA H100 80GB HBM3"
    monkeypatch.delenv("OUT", raising=False)
    assert suite.output(suite.parse([]), gpu) == ROOT / "bench" / "results" / "device_nvidia_h100_80gb_hbm3.json"
    monkeypatch.setenv("OUT", str(tmp_path))
    runs: tuple[list[str], ...] = (["smoke"], ["full"], ["step"], [], ["--only", "time"], ["--only", "tune,time"])
    outputs = [suite.output(suite.parse(arguments), name) for arguments in runs for name in (gpu, "NVIDIA H200")]
    assert len(set(outputs)) == len(outputs)
    assert {path.parent for path in outputs} == {tmp_path}
    assert outputs[0].name == "device_smoke_nvidia_h100_80gb_hbm3.json"
    assert suite.output(suite.parse(["smoke", "--output", "mine.json"]), gpu) == Path("mine.json")


def test_a_section_that_does_not_import_fails_alone(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bench.device.absent", None)
    assert section.record.run("absent", suite.section_of("bench.device.absent"), "cpu", 1.0, {}) == "failed"
    assert section.record.data["sections"]["absent"]["failures"][0].startswith("ModuleNotFoundError")


def test_a_section_that_grows_as_another_writes_leaves_a_whole_file(
    section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps, tries = json.dumps, []

    def interrupted(*arguments: Any, **options: Any) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("dictionary changed size during iteration")
        return dumps(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", interrupted)
        section.record.data["found"] = 7
        section.save()
    assert len(tries) == 3
    assert written(section.record.path)["found"] == 7


def test_the_page_about_gpus_has_the_commands_that_there_are() -> None:
    """Each as it is to be typed, with a commit, and what it costs."""
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    calls = [shlex.split(line.replace("$COMMIT", "abc"))[3:] for line in lines if "bench.device" in line]
    parsed = [suite.parse(arguments) for arguments in calls]
    assert [options.slice for options in parsed] == list(suite.SLICES)
    assert {options.commit for options in parsed} == {"abc"}
    assert "make wheels-for-device" in lines
    for name, one in suite.SLICES.items():
        assert re.search(rf"^\| `{name}` \| {one.budget:g} s \|", page, re.MULTILINE)


# ---------------------------------------------------------------------------------------------------- subprocesses


def test_a_child_may_ask_for_patience_and_is_ended_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert subprocesses.SILENCE == 40.0
    begin = "import time\nfrom bench.device.subprocesses import report\n"
    got: list[Any] = []

    def run(program: str) -> subprocesses.Finished:
        return subprocesses.run([sys.executable, "-c", begin + program], 30.0, got.append, silence=2.0)

    assert run("report(step=1, patience=20)\ntime.sleep(3)\nreport(step=2)").code == 0
    # Only until the next report.
    ended = run("report(patience=20)\nreport(step=3)\ntime.sleep(30)")
    assert ended.code is None
    assert ended.seconds < 15
    assert got == [{"step": 1}, {"step": 2}, {"step": 3}]


PIECES = """
import json, os, sys, time
from bench.device import subprocesses

def take(name):
    subprocesses.report(figure=name)
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    if name == "raises":
        raise ValueError("no such thing")
    if name == "loses the device":
        subprocesses.device_answers = lambda: False

subprocesses.take_pieces(json.loads(sys.argv[1]), take)
"""


def test_a_bad_piece_costs_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pieces_child.py").write_text(PIECES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(subprocesses, "SILENCE", 4.0)
    names = ["first", "dies", "raises", "hangs", "loses the device", "last"]
    got: list[str] = []
    end = time.monotonic() + 60
    failed = subprocesses.run_pieces(
        "pieces_child", {}, names, lambda: end - time.monotonic(), lambda f: got.append(f["figure"])
    )
    assert got == names
    assert list(failed) == names[1:-1]
    assert failed["raises"] == "ValueError: no such thing"
    assert failed["dies"].startswith("took the process with it: exit code -6")
    assert failed["hangs"].startswith("took the process with it: it reported nothing for too long")
    assert failed["loses the device"] == "took the device with it: None"
    failed = subprocesses.run_pieces("no_such_module", {}, ["a", "b"], lambda: 20.0, print)
    assert {why.partition(":")[0] for why in failed.values()} == {"its process did not begin"}
    assert list(failed) == ["a", "b"]
    # Out of time nothing has failed.
    assert subprocesses.run_pieces("pieces_child", {}, ["hangs"], lambda: 0.0, print) == {}


# ----------------------------------------------------------------------------------------------------------- tests

COLLECT = """
import json
from bench.device import pytest_plugin

def pytest_collection_modifyitems(items):
    here = [item for item in items if pytest_plugin.wanted(item, "cuda")]
    stages = [name for wave in __import__("bench.device.testing", fromlist="x").WAVES for name in wave.stages]
    here.sort(key=lambda item: pytest_plugin.urgency(item, stages))
    parity = [item for item in here if pytest_plugin.stage(item) == "parity"]
    wide = [
        definition.argname
        for item in here
        if item.path.parent.name == "gpu"
        for definitions in item._fixtureinfo.name2fixturedefs.values()
        for definition in definitions
        if definition.scope != "function" and "/gpu/" in str(definition.func.__code__.co_filename)
    ]
    subprocesses = __import__("bench.device.subprocesses", fromlist="x")
    subprocesses.report(
        stages=[(item.nodeid, pytest_plugin.stage(item)) for item in here],
        shares=[[item.nodeid for item in pytest_plugin.shared_out(parity, i, 12)] for i in range(12)],
        wide=wide,
    )
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tests of the section as a GPU would be given them, which are collected without one too."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "stage_printer.py").write_text(COLLECT)
    got: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "stage_printer", *testing.FILES]
    ended = subprocesses.run(command, 120, got.append, {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}, 120)
    assert len(got) == 1, ended.output
    return got[0]


def test_what_matters_most_is_tested_first(collected: dict[str, Any]) -> None:
    stages = collected["stages"]
    order = [name for wave in testing.WAVES for name in wave.stages]
    assert order == ["parity", "triton", "torch", "cuda", "large", "fp64"]
    assert [order.index(stage) for _, stage in stages] == sorted(order.index(stage) for _, stage in stages)
    by_stage = {stage: [name for name, one in stages if one == stage] for stage in order}
    sizes = {stage: len(names) for stage, names in by_stage.items()}
    # test_cuda.py has its GPU variants only where the extension is built.
    assert min(sizes.values()) >= 10
    assert 100 < sizes["parity"] < 250
    assert all("triton" in name for name in by_stage["parity"])
    assert not any(
        re.search(r"float(16|32)\b(?<!bfloat16)|fp16|fp32", name.partition("[")[2]) for name in by_stage["parity"]
    )
    assert all("two_to_the_31" in name for name in by_stage["large"])
    assert not any("in_fp64" in name or "float64" in name for stage in order[:5] for name in by_stage[stage])
    assert all(re.search(r"cuda-cuda|\[cuda\]", name) for name in by_stage["cuda"])
    for stage in order:
        # What compiles whole graphs keeps nothing waiting.
        compiled = ["compile" in name.partition("[")[0] for name in by_stage[stage]]
        assert compiled == sorted(compiled)


def test_kernels_that_are_the_same_are_compiled_by_one_worker(collected: dict[str, Any]) -> None:
    shares = collected["shares"]
    parity = [name for name, stage in collected["stages"] if stage == "parity"]
    assert sorted(name for share in shares for name in share) == sorted(parity)
    assert max(map(len, shares)) <= 3 * min(map(len, shares))
    budget = "test_error_is_within_the_budget_of_plain_pytorch[cuda-triton-bfloat16-regression-softcap-252"
    assert sum(any(budget in name for name in share) for share in shares) == 1


def test_a_gpu_test_starts_only_what_it_needs(collected: dict[str, Any]) -> None:
    """What a module's fixture starts, every worker that has one of its tests would start."""
    assert collected["wide"] == []


def test_waves_follow_one_another_and_the_build_runs_behind(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    limits: dict[str, float] = {}
    lock = threading.Lock()

    def build(one: Section) -> None:
        assert one.options["jobs"] == 4
        assert one.dry
        time.sleep(0.5)
        events.append("built")

    def work(outcomes: testing.Outcomes, share: str, stages: list[str], files: Any, folder: str, until: float) -> None:
        with lock:
            events.append(f"{stages[0]} {share}")
            limits[stages[0]] = until - time.monotonic()
            outcomes.put(f"{stages[0]} {share}", "passed", 0.1, "")

    monkeypatch.setattr(building, "run", build)
    monkeypatch.setattr(testing, "work", work)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    section.options = {"workers": 12, "build": True, "dry": True}
    section._deadline = time.monotonic() + 150
    testing.run(section)
    assert section.failures == []
    waves = [event.split()[0] for event in events]
    assert waves == ["parity"] * 12 + ["built"] + ["cuda"] * 12 + ["large"] + ["fp64"] * 12
    assert "large 0/1" in events
    assert [limits[name] for name in ("parity", "cuda", "large", "fp64")] == pytest.approx([80, 105, 130, 150], abs=3)
    assert section.record.data["sections"]["build"]["outcome"] == "passed"
    # A machine of two processors takes one.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    events.clear()
    section.options = {"workers": 12, "stages": ("parity",)}
    testing.run(section)
    assert events == ["parity 0/1"]


# ----------------------------------------------------------------------------------------------------------- probe


def test_chunks_are_those_that_buffers_have_room_for() -> None:
    # 4 bytes of hidden and gradient a component, 2 an exponential and a sixteenth more: 982 rows at V 128256.
    rows = {(v, mib): probing.chunk_rows(v, 2048, mib) for v in (51200, 128256) for mib in probing.BUFFERS_MIB}
    assert rows[128256, 256] == 896
    for (vocabulary, mib), count in rows.items():
        assert count % 128 == 0
        assert count * vocabulary * 2 < mib << 20 < 1.4 * (count + 128) * vocabulary * 2
    names = list(probing.Probe("cuda").pieces)
    assert names[0] == "ceilings"
    assert sum(name.startswith("stages") for name in names) == 6
    assert "call V 51200 N 8192 H 2048 trained, 512 MiB" in names[:4]


triton_only = pytest.mark.skipif(
    backends.availability().get("triton", "not registered") is not None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


def test_a_piece_that_fails_fails_the_probe(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_pieces(module: str, plan: Any, names: list[str], left: Any, each: Any) -> dict[str, str]:
        each({"figure": {"piece": "ceilings", "copy_TB_s": 3.0}})
        assert written(section.record.path)["sections"]["probe"]["figures"] == [{"piece": "ceilings", "copy_TB_s": 3.0}]
        return failed

    monkeypatch.setattr(subprocesses, "run_pieces", run_pieces)
    failed: dict[str, str] = {}
    assert section.record.run("probe", probing.run, "cpu", 10.0, {}) == "passed"
    failed["stages R 96 V 512"] = "RuntimeError: no"
    assert section.record.run("probe", probing.run, "cpu", 10.0, {}) == "failed"
    assert section.record.data["sections"]["probe"]["failures"] == ["stages R 96 V 512: RuntimeError: no"]


# ------------------------------------------------------------------------------------------------------------ time


def test_quacks_reference_goes_without_gradients_through_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def chunked(x: Any, weight: Any, target: Any, chunk_size: int, reduction: str) -> Any:
        calls.append((torch.is_grad_enabled(), chunk_size, reduction))
        return torch.nn.functional.cross_entropy((x @ weight.T).float(), target, reduction=reduction)

    module = types.ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x = timing.make_inputs(timing.SMALL_SHAPES[0].workload(), 0, "cpu")
    with timing.packed_beforehand():
        got, expected = peers.quack(x), peers.plain_cross_entropy(x)
    assert calls == [(False, peers.QUACK_ROWS, "sum"), (True, peers.QUACK_ROWS, "sum")]
    torch.testing.assert_close(got, expected)


def test_what_a_shape_had_is_kept_where_its_time_was_up(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = timing.SMALL_SHAPES[0]

    def child(command: list[str], seconds: float, each: Any) -> subprocesses.Finished:
        each({"begun": "bare products", "shape": shape.name})
        each({"once": 7.0, "peak_mib": None, "entry": "bare products", "shape": shape.name})
        section._deadline = 0.0
        return subprocesses.Finished(None, 1.0, "")

    monkeypatch.setattr(subprocesses, "run", child)
    section.options = {"shapes": (shape,)}
    timing.run(section)
    assert section.data["once"] == {shape.name: {"bare products": {"ms": 7.0, "peak_mib": None}}}
    assert section.failures == [f"{shape.name}: not reached"]


def test_a_peer_whose_import_ended_the_process_is_not_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    imported = []
    implementation = registry.Implementation(registry.plain, registry.plain, unavailable=lambda: imported.append(1))
    monkeypatch.setattr(
        timing, "IMPLEMENTATIONS", {registry.BARE: registry.IMPLEMENTATIONS[registry.BARE], "peer": implementation}
    )
    monkeypatch.setattr(timing, "report", lambda **fields: told.append(fields))
    assert "peer" in timing.entries(timing.SMALL_SHAPES[0], "cpu")[0]
    assert told == [{"begun": "peer", "shape": timing.SMALL_SHAPES[0].name}]
    assert "peer" not in timing.entries(timing.SMALL_SHAPES[0], "cpu", {"peer"})[0]
    assert len(imported) == 1


# ------------------------------------------------------------------------------------------------------------ step


def test_steps_of_trainers_are_compared_and_other_rows_or_gradients_are_failures(section: Section) -> None:
    def steps(*seconds: float, rows: str = "r", norm: float = 2.0) -> dict[str, Any]:
        one = {"loss": 0.69, "grad_norm": norm, "rows": rows, "tokens": 100, "scored": 50, "peak_mib": 9.0}
        return {
            "steps": [{**one, "seconds": s} for s in seconds],
            "before_mib": 1.0,
            "held_before_mib": None,
            "trained": 5,
            "parameters": 50,
        }

    ours, theirs = "LoRA, mopo_kernels, sdpa", "LoRA, TRL, fastest, sdpa"
    found = {ours: steps(9.0, 1.0, 2.0, 3.0), theirs: steps(9.0, 4.0), f"{ours}, again": steps(9.0, 2.0)}
    # One that got no further than its first step says nothing.
    found["full, mopo_kernels, sdpa"] = steps(9.0)
    results = stepping.summaries(found)
    assert list(results) == [ours, theirs]
    assert results[ours]["over_TRL"] == 0.5
    assert results[ours]["by_round"] == [2.0, 2.0]
    assert results[ours]["tokens_per_second"] == 50
    assert stepping.disagreements(results, 0.05) == []
    assert ours in stepping.table(results)
    results = stepping.summaries({ours: steps(9.0, 1.0, norm=2.2), theirs: steps(9.0, 4.0, rows="s")})
    assert stepping.disagreements(results, 0.05) == [
        f"{theirs} trained on other rows than {ours}",
        f"{theirs}: grad_norm of the first step differs from that of {ours} by 9.1e-02",
    ]


# transformers renames gradient checkpointing.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")
def test_a_run_whose_time_is_up_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(stepping, "report", lambda **fields: told.append(fields))
    stepping.take(stepping.RUNS[0].name, "cpu", 0.0)
    assert not any("seconds" in fields.get("step", {}) for fields in told)
    assert "parameters" in told[1]


def test_the_model_has_1_3_billion_numbers() -> None:
    model = stepping.make_model(stepping.replace(stepping.WORK["cuda"], device="meta"), "sdpa")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.3e9, rel=0.05)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_trainers_that_are_missing_are_named(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(stepping, "report", lambda **fields: told.append(fields))
    monkeypatch.setattr(stepping, "unavailable", lambda one, work: "trl cannot be imported")
    name = stepping.RUNS[1].name
    stepping.take(name + stepping.AGAIN, "cpu", 0.0)
    assert told == [{"run": name, "unavailable": "trl cannot be imported"}]
    monkeypatch.setattr(stepping.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(NotHere, match="transformers is not installed"):
        stepping.run(section)


# ---------------------------------------------------------------------------------------------------------- wheels


def make_wheel(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "HERE = True\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent_pkg\n"
        )
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_installed_into_a_folder_of_their_own_for_children_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "wheels").mkdir()
    target = tmp_path / "target"
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    assert "make wheels-for-device" in wheels.install(target, folder)["reason"]
    make_wheel(folder, "device_peer_one")
    assert wheels.install(target, folder) == {"installed": ["device_peer_one-1.0-py3-none-any.whl"]}
    assert os.environ["PYTHONPATH"] == f"{target}{os.pathsep}before"
    code = "import device_peer_one; print(device_peer_one.__file__)"
    assert str(target) in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    # For another Python: the run goes on without, and says why.
    make_wheel(folder, "device_peer_two", "py27-none-any")
    reason = wheels.install(tmp_path / "other", folder)["reason"]
    assert "is not a supported wheel on this platform" in reason
    assert "other" not in os.environ["PYTHONPATH"]


def test_the_wheels_are_the_peers_that_the_project_compares_with() -> None:
    rule = subprocess.run(
        ["make", "--no-print-directory", "-n", "wheels-for-device"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"},
        capture_output=True,
        text=True,
    ).stdout
    pinned = re.search(r"^peers = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert pinned is not None
    for peer in re.findall(r'"([^"]+)==', pinned[1]):
        assert peer in rule.split()
    for package in ("datasets", "dill", "multiprocess"):
        assert package in rule.split()
    for versions in ("lock.txt", "no_deps.txt"):
        assert f"--constraint requirements/{versions}" in rule
    assert f"--dest {wheels.FOLDER.name} " in rule
    assert f"{wheels.FOLDER.name}/" in (ROOT / ".gitignore").read_text().split()
