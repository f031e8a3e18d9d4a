"""``make device`` without a GPU: its sections run on the CPU or against stand-ins; what it writes survives any end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import implementations as registry
from bench.device import __main__ as suite
from bench.device import building, pytest_plugin, sanitizing, subprocesses, testing, timing, tuning
from bench.device.record import NotHere, Record, Section, description, first_line
from bench.implementations import BARE, Implementation
from mopo_kernels import backends
from mopo_kernels.backends.torch_ops import TorchBackend

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bench.device"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def section(tmp_path: Path) -> Section:
    return Section(Record(tmp_path / "run.json", {"device": {"name": "a processor"}}), "cpu", 60.0, {})


def written(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def stand_in(monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
    """The suite has these sections instead of its own."""
    monkeypatch.setattr(suite, "SECTIONS", {name: (f"stand_in_{name}", 1.0) for name in sections})
    monkeypatch.setattr(suite, "DEFAULT", tuple(sections))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for name, run in sections.items():
        module = types.ModuleType(f"stand_in_{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)


def run_main(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = tmp_path / "run.json"
    code = suite.main(["--device", "cpu", "--output", str(output), *arguments])
    return code, written(output)


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_so_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bench.device needs a CUDA device, torch >= 2.11 and triton >= 3.6: torch ")


@pytest.mark.parametrize(("name", "version"), [("torch", "2.10.1+cu130"), ("triton", "3.5.0")])
def test_what_is_too_old_or_missing_is_named(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {
        "torch": types.SimpleNamespace(__version__="2.11.0"),
        "triton": types.SimpleNamespace(__version__="3.6.0"),
    }
    others[name] = types.SimpleNamespace(__version__=version)
    monkeypatch.setattr(suite.importlib, "import_module", others.__getitem__)
    assert suite.missing("cuda") == f"{name} {version} is older than {'2.11' if name == 'torch' else '3.6'}"
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda wanted: None if wanted == name else True)
    assert suite.missing("cuda") == f"{name} is not installed for {sys.executable}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "build,everything"],
            "there is no section 'everything'; choose from build, tests, probe, time, sanitize",
        ),
        (["--budget", "0"], "expected a positive number; got 0"),
    ],
    ids=["section", "budget"],
)
def test_a_wrong_argument_is_refused_with_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        suite.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_sections_can_be_chosen_and_tuning_is_asked_for() -> None:
    assert suite.parse([]).sections == ["build", "tests", "time", "sanitize"]
    assert suite.parse(["--tune"]).sections == ["build", "tests", "time", "sanitize", "tune"]
    # In their own order, whatever the order they were given in.
    assert suite.parse(["--only", "time,build"]).sections == ["build", "time"]
    for module, _ in suite.SECTIONS.values():
        assert importlib.util.find_spec(module) is not None


def test_make_device_installs_and_downloads_nothing() -> None:
    # Not the options of a make that runs the tests.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "device", "ARGS=--only build"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "python3 -m bench.device --only build\n", done.stderr


# ---------------------------------------------------------------------------------------------------- the record


def test_a_failing_section_is_recorded_and_the_next_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(section: Section) -> None:
        section.data["found"] = 7

    def bad(section: Section) -> None:
        raise ValueError("no such thing\nsecond line")

    def lists(section: Section) -> None:
        section.failures.append("one of two is wrong")

    def absent(section: Section) -> None:
        raise NotHere("the tool is not installed")

    stand_in(monkeypatch, bad=bad, lists=lists, absent=absent, good=good)
    code, data = run_main(tmp_path)
    assert code == 1
    assert data["outcome"] == "failed"
    outcomes = {name: found["outcome"] for name, found in data["sections"].items()}
    assert outcomes == {"bad": "failed", "lists": "failed", "absent": "not here", "good": "passed"}
    assert data["sections"]["bad"]["failures"] == ["ValueError: no such thing"]
    assert "no such thing" in data["sections"]["bad"]["traceback"]
    assert data["sections"]["absent"]["reason"] == "the tool is not installed"
    assert data["sections"]["good"]["found"] == 7
    assert all(found["seconds"] >= 0 for found in data["sections"].values())
    printed = capsys.readouterr().out
    assert "one of two is wrong" in printed
    assert "absent: not here in 0.0 s the tool is not installed" in printed
    code, data = run_main(tmp_path, "--only", "absent,good")
    assert code == 0
    assert data["outcome"] == "passed"


def test_the_record_says_what_ran_where(tmp_path: Path) -> None:
    options = argparse.Namespace(device="cpu", commit=None, slice=None, sections=["time"], budget=60.0)
    found = description(options)
    assert found["versions"]["torch"] == torch.__version__
    assert found["command"] == "python -m bench.device --only time --budget 60"
    assert found["device"]["name"]
    assert found["commit"]
    options.commit, options.slice = "abc", "smoke"
    assert description(options)["commit"] == "abc"
    assert description(options)["command"] == "python -m bench.device smoke --budget 60"
    # Nothing of the machine's folders.
    assert str(ROOT) not in json.dumps(found)
    assert first_line(KeyError()) == "KeyError: no message"


def test_a_section_gets_what_those_before_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def note(section: Section) -> None:
        limits.append(section.left)

    stand_in(monkeypatch, first=note, second=note, third=note)
    run_main(tmp_path, "--budget", "90")
    assert limits == pytest.approx([30, 45, 90], abs=2)


def test_the_file_is_whole_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"

    def steps(section: Section) -> None:
        assert written(path)["sections"]["steps"]["outcome"] == "running"
        for step in range(3):
            section.data["step"] = step
            section.save()
            assert written(path)["sections"]["steps"]["step"] == step
        raise KeyboardInterrupt

    stand_in(monkeypatch, steps=steps)
    with pytest.raises(KeyboardInterrupt):
        run_main(tmp_path)
    data = written(path)
    assert list(tmp_path.iterdir()) == [path]
    # What is there is not touched before what replaces it is whole.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: None)
        Record(path, {"other": 1})
    assert written(path) == data
    next(other for other in tmp_path.iterdir() if other != path).unlink()
    assert data["outcome"] == "running"
    assert data["sections"]["steps"]["outcome"] == "interrupted"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_run_that_is_ended_leaves_valid_json_and_told_to_end_no_children(tmp_path: Path) -> None:
    """Killed at once, or told to end: then its children end too."""
    outputs = {signal.SIGKILL: tmp_path / "kill.json", signal.SIGTERM: tmp_path / "term.json"}
    runs = {
        number: subprocess.Popen(
            [*COMMAND, "--device", "cpu", "--only", "time", "--output", str(output)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        for number, output in outputs.items()
    }
    left: dict[int, list[int]] = {}
    try:
        for number, run in runs.items():
            deadline = time.monotonic() + 60
            # Until the section runs and has its child.
            while number not in left and time.monotonic() < deadline:
                time.sleep(0.05)
                found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True)
                if outputs[number].exists() and "time" in written(outputs[number])["sections"] and found.stdout:
                    left[number] = list(map(int, found.stdout.split()))
            run.send_signal(number)
            assert run.wait(timeout=30) == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
        assert {number: written(output)["sections"]["time"]["outcome"] for number, output in outputs.items()} == {
            signal.SIGKILL: "running",
            signal.SIGTERM: "interrupted",
        }
        assert not any(map(alive, left[signal.SIGTERM]))
    finally:
        for run in runs.values():
            run.kill()
            run.wait()
        for pid in left.get(signal.SIGKILL, []):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------- subprocesses


def test_a_childs_reports_survive_whatever_ends_it() -> None:
    def run(program: str, seconds: float = 20.0, silence: float = 20.0) -> tuple[list[Any], subprocesses.Finished]:
        got: list[Any] = []
        code = f"import os, time\nfrom bench.device.subprocesses import report\nreport(step=1)\n{program}"
        return got, subprocesses.run([sys.executable, "-c", code], seconds, got.append, silence=silence)

    got, ended = run("report(step=2)\nprint('done')")
    assert (got, ended.code, ended.output) == ([{"step": 1}, {"step": 2}], 0, "done\n")
    assert ended.failure is None
    got, ended = run("os.abort()")
    assert got == [{"step": 1}]
    assert ended.failure == f"exit code {-signal.SIGABRT}"
    got, ended = run("time.sleep(60)", seconds=1.0)
    assert got == [{"step": 1}]
    assert ended.failure == "stopped: out of time"
    assert ended.seconds < 10
    got, ended = run("time.sleep(60)", silence=1.0)
    assert got == [{"step": 1}]
    assert ended.seconds < 10


# ----------------------------------------------------------------------------------------------------------- tests

CRASHES = """
import os, time
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not today")
def test_is_skipped():
    pass

def test_aborts():
    os.abort()

def test_hangs():
    time.sleep(60)

@pytest.fixture
def broken():
    raise RuntimeError("no fixture")

def test_without_its_fixture(broken):
    pass

def test_passes_after_all_that():
    pass
"""


def test_a_test_that_takes_its_process_with_it_costs_one_test(section: Section, tmp_path: Path) -> None:
    file, broken = tmp_path / "test_crashes.py", tmp_path / "test_broken.py"
    file.write_text(CRASHES)
    broken.write_text("import no_such_module\n")
    section.options = {"files": (str(broken), str(file)), "workers": 1, "stages": ("triton",), "silence": 2.0}
    testing.run(section)
    outcomes = {"passed": 2, "failed": 3, "skipped": 1, "crashed": 2, "not run": 0}
    assert section.data["counts"] == outcomes
    why = {name.partition("::")[2]: text for name, text in section.data["failed"].items()}
    assert "no_such_module" in why[""]
    assert "one is not two" in why["test_fails"]
    assert "no fixture" in why["test_without_its_fixture"]
    assert why["test_aborts"].startswith(f"exit code {-signal.SIGABRT}")
    assert why["test_hangs"].startswith("it hung")
    assert section.data["skipped"] == {"not today": 1}
    assert section.failures == ["3 tests failed", "2 tests crashed"]


def test_a_lost_device_ends_a_worker_and_a_late_one_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = tmp_path / "done"
    done.write_text("")
    told = {
        pytest_plugin.SHARE: "0/1",
        pytest_plugin.STAGES: "triton",
        pytest_plugin.DONE: str(done),
        pytest_plugin.SECONDS: "60",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocesses, "report", lambda **fields: None)
    failed = types.SimpleNamespace(when="call", passed=False, failed=True, skipped=False, nodeid="a", outcome="failed")
    failed.longrepr, failed.duration = "it failed", 0.1
    for answers, expected in ((True, None), (False, "the device no longer answers")):
        monkeypatch.setattr(pytest_plugin, "device_answers", lambda answers=answers: answers)
        worker = pytest_plugin.Recorder()
        worker.pytest_sessionstart(types.SimpleNamespace(shouldstop=None))
        worker.pytest_runtest_logreport(failed)
        assert worker.session.shouldstop == expected
    monkeypatch.setattr(pytest_plugin, "device_answers", lambda: True)
    monkeypatch.setenv(pytest_plugin.SECONDS, "-1")
    worker = pytest_plugin.Recorder()
    worker.pytest_sessionstart(types.SimpleNamespace(shouldstop=None))
    worker.pytest_runtest_logreport(failed)
    assert worker.session.shouldstop == "out of time"


def test_every_file_that_the_section_names_is_there() -> None:
    assert [name for name in testing.FILES if not (ROOT / name).exists()] == []


# ------------------------------------------------------------------------------------------------------------ time


def _wrong(x: registry.Inputs) -> registry.Result:
    loss, *gradients = registry.plain_compacted(x)
    return loss, *(gradient * 1.5 for gradient in gradients)


def _out_of_memory(x: registry.Inputs) -> registry.Result:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB.\nMore text")


def _slow(x: registry.Inputs) -> registry.Result:
    time.sleep(2.0)
    return registry.plain_compacted(x)


def _late(calls: list[int]) -> Any:
    """Fails in the rounds, after it succeeded alone."""

    def run(x: registry.Inputs) -> registry.Result:
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return registry.plain_compacted(x)

    return run


@pytest.fixture
def few_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare products, one of this library's, plain PyTorch, and some that do not work."""
    kept = {
        name: registry.IMPLEMENTATIONS[name] for name in (BARE, "plain PyTorch, scored rows", "plain PyTorch, all rows")
    }
    plain = registry.plain_compacted
    kept["wrong"] = Implementation(_wrong, plain)
    kept["large"] = Implementation(_out_of_memory, plain)
    kept["late"] = Implementation(_late([]), plain)
    kept["absent"] = Implementation(plain, plain, unavailable=lambda: "not installed")
    monkeypatch.setattr(timing, "IMPLEMENTATIONS", kept)
    monkeypatch.setitem(timing.SLOW, "cpu", float("inf"))  # on a loaded machine the smallest products take any time
    monkeypatch.setattr(timing.backends, "availability", lambda: {"naive": None, "torch": None})


def test_what_takes_far_longer_than_the_bare_products_is_timed_once(
    few_implementations: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(timing.SLOW, "cpu", 20.0)
    monkeypatch.setitem(timing.IMPLEMENTATIONS, "slow", Implementation(_slow, registry.plain_compacted))
    found = timing.measure(timing.SMALL_SHAPES[0], "cpu", 0.0, {"dropped before"})
    assert found["slow"]["slow"] > 2000
    assert "slow" not in found["results"]


@pytest.mark.parametrize("shape", timing.SMALL_SHAPES, ids=lambda shape: shape.name)
def test_implementations_are_timed_in_turns_and_those_that_do_other_work_are_not(
    shape: timing.Shape, few_implementations: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = timing.measure(shape, "cpu", 0.0, {"dropped before"})
    own = "mopo_kernels torch"
    expected = [BARE, own, f"{own}, K 8", *([f"{own}, offsets on the device"] if shape.trained else [])]
    assert list(found["results"]) == [*expected, "plain PyTorch, scored rows"]
    assert found["failed"]["wrong"].startswith("disagrees with plain PyTorch by ")
    assert found["failed"]["large"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 7 GiB."
    assert found["failed"]["late"] == "OutOfMemoryError: CUDA out of memory."
    assert found["unavailable"] == {"absent": "not installed"}
    assert found["slow"] == {}
    assert found["rounds"] == timing.FEWEST
    assert list(found["k_8_over_k_1"]) == ["torch"]
    for name, row in found["results"].items():
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["tokens_per_second"] == pytest.approx(shape.tokens / row["ms"] * 1e3)
        assert row["difference_from_plain"] < 1e-3
        assert row["offsets"] == ("host" if name in (own, f"{own}, K 8") else "device")
        assert row["objectives"] == (8 if "K 8" in name else 1)
    assert found["results"][BARE]["ratio"] == 1
    assert found["units"] == (4 if shape.trained else 3)
    text = timing.table(json.loads(json.dumps(found)))
    assert all(name in text for name in [*found["results"], *found["slow"], *found["failed"]])


def test_only_some_entries_have_their_offsets_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x = timing.make_inputs(timing.SMALL_SHAPES[0].workload(), 0, "cpu")
    hosted = []
    monkeypatch.setattr(timing, "on_host", lambda given: hosted.append(given) or given)
    for host in (True, False):
        timing.Entry(registry.IMPLEMENTATIONS[BARE], host=host).prepare({1: x})
    assert len(hosted) == 1
    found, _ = timing.entries(timing.SMALL_SHAPES[0], "cpu")
    assert {name for name, entry in found.items() if entry.host} == {
        name for name in found if name.startswith(timing.OWN) and "offsets on the device" not in name
    }


def test_entries_that_were_dropped_do_not_run(few_implementations: None) -> None:
    found = timing.measure(timing.SMALL_SHAPES[0], "cpu", 0.0, {"large", "wrong", "late", "slow"})
    assert found["failed"] == found["slow"] == {}


class FakeEvent:
    """A device's clock that advances by what each call says it takes."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_device_times_are_those_of_events_around_each_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits within a round; the first call of a round is taken twice, and its second time counts."""
    waited, order = [], []

    def call(name: str, *milliseconds: float) -> Any:
        times = list(milliseconds)

        def run() -> None:
            order.append(name)
            FakeEvent.now += times.pop(0) if len(times) > 1 else times[0]

        return run

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(order)))
    calls = {"a": call("a", 100.0, 3.0), "b": call("b", 5.0)}
    cache = torch.empty(1)
    taken = timing.take_turns(calls, "cuda", cache, 0)
    assert {name: times[0] for name, times in taken.items()} == {"a": 3.0, "b": 5.0}
    assert (order, waited) == (["a", "a", "b"], [3])
    order.clear()
    timing.take_turns(calls, "cuda", cache, 1)
    assert order == ["b", "b", "a"]
    for name, value in (("memory_allocated", 5 << 20), ("max_memory_allocated", 12 << 20)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    assert timing.peak_mib(calls["b"], "cuda") == 7.0


def test_the_least_work_is_counted_in_products_of_the_shape() -> None:
    shape = timing.Shape(51200, 8192, trained=True)
    assert shape.workload().scored == 8192
    assert shape.workload(8).objectives == 8
    assert {(s.vocabulary, s.tokens, s.trained) for s in timing.SHAPES} == {
        (v, n, t) for v in (51200, 128256) for n in (4096, 8192, 32768) for t in (True, False)
    }
    assert all(s.hidden == 2048 and s.workload().scored == s.tokens for s in timing.SHAPES)
    row = timing.summary(
        BARE, timing.Entry(registry.IMPLEMENTATIONS[BARE]), shape, [{BARE: [10.0, 1.0]}] * 5, 0.0, None
    )
    # 4 products of 2 * 8192 * 51200 * 2048 operations in 10 ms.
    assert row["tflops"] == pytest.approx(4 * 2 * 8192 * 51200 * 2048 / 10e-3 / 1e12)
    assert row["tokens_per_second"] == pytest.approx(819_200)


def test_the_section_times_every_shape_in_a_child(
    section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Triton's interpreter would take a minute, and peers take seconds to import.
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for peer in ("trl", "liger_kernel", "cut_cross_entropy"):
        (tmp_path / f"{peer}.py").write_text("raise ImportError('not now')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    shape = timing.Shape(67, 16, True, hidden=8, response=4, dtype="float32")
    section.options = {"shapes": (shape,)}
    timing.run(section)
    assert section.failures == [], section.data
    found = section.data["shapes"][shape.name]
    assert found["unavailable"]["Liger DPO, scored rows"].endswith("not now")
    # On a busy machine anything may take so long that it is timed once.
    timed = found["results"].keys() | found["slow"].keys()
    assert {BARE, "mopo_kernels torch", "plain PyTorch, scored rows"} <= timed
    assert BARE in found["results"]
    assert BARE in capsys.readouterr().out


def test_an_entry_that_ends_its_process_is_dropped_and_the_rest_goes_on(
    section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = timing.SMALL_SHAPES
    plans = []

    def child(command: list[str], seconds: float, each: Any) -> subprocesses.Finished:
        plan = json.loads(command[-1])
        plans.append(plan)
        if len(plans) == 1:
            each({"begun": "bad", "shape": shapes[0].name})
            return subprocesses.Finished(-11, 1.0, "")
        if len(plans) == 2:
            each({"begun": "worse", "shape": shapes[0].name})
            each({"lost": "worse: an illegal memory access", "shape": shapes[0].name})
            return subprocesses.Finished(3, 1.0, "")
        for fields in plan["shapes"]:
            shape = timing.Shape(**fields)
            each({"shape": shape.name, "found": {"error": "ValueError: no"}})
        return subprocesses.Finished(0, 1.0, "")

    monkeypatch.setattr(subprocesses, "run", child)
    timing.run(section)
    assert [plan["dropped"] for plan in plans] == [[], ["bad"], ["bad", "worse"]]
    assert section.failures == [
        *(f"{shape.name}: ValueError: no" for shape in shapes),
        "bad: took the process with it: exit code -11: ",
        "worse: took the process with it: worse: an illegal memory access",
    ]


# ------------------------------------------------------------------------------------------- build, sanitize, tune


def test_the_build_is_for_this_device_and_a_missing_backend_is_a_failure(
    section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    section.device = "cuda"
    section.record.data["device"]["capability"] = "9.0"
    commands = []

    def child(command: list[str], seconds: float, environment: Any = None, silence: float = 0) -> subprocesses.Finished:
        commands.append((command, environment))
        if "setup.py" in command:
            return subprocesses.Finished(1, 1.0, "nvcc: no such header")
        return subprocesses.Finished(0, 1.0, 'a warning\nserved {"triton": null, "cuda": "it was not built"}\n')

    monkeypatch.setattr(subprocesses, "run", child)
    building.run(section)
    command, environment = commands[0]
    assert command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert environment["MOPO_BUILD"] == "auto"
    assert environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert section.failures == [
        "setup.py build_ext: exit code 1",
        "backend 'cuda' is not available after the build: it was not built",
    ]
    assert section.data["output"] == "nvcc: no such header"


def test_the_package_is_asked_which_backends_serve() -> None:
    answer = building.served("cpu")
    assert answer["torch"] is None
    assert answer["naive"] is None
    assert all(reason is None or reason.strip() for reason in answer.values())


def test_without_the_sanitizer_the_section_is_left_out(section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(NotHere, match="compute-sanitizer is not installed"):
        sanitizing.run(section)


@pytest.mark.parametrize("works", [True, False], ids=["works", "sees nothing"])
def test_errors_of_the_sanitizer_are_failures_where_it_sees_a_planted_one(
    works: bool, section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"control memcheck": 86 if works else 1, "cuda memcheck": 0, "cuda racecheck": 86, "triton memcheck": 1}

    def child(command: list[str], seconds: float, environment: Any, silence: float) -> subprocesses.Finished:
        assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return subprocesses.Finished(
            codes[f"{command[-2]} {command[command.index('--tool') + 1]}"], 1.0, "what was seen"
        )

    monkeypatch.setattr(subprocesses, "run", child)
    monkeypatch.setattr(sanitizing.shutil, "which", lambda name: f"/bin/{name}")
    if not works:
        with pytest.raises(NotHere, match="does not see a planted error on this machine: what was seen"):
            sanitizing.run(section)
        return
    sanitizing.run(section)
    assert section.failures == ["cuda racecheck: an error was found", "triton memcheck: exit code 1"]


class ForgetsTheTarget(TorchBackend):
    def logits_bwd_(self, tile, bias, target, *rest):
        super().logits_bwd_(tile, bias, target.clamp(max=-1), *rest)


def test_what_the_sanitizer_runs_is_right_and_would_be_noticed_if_not() -> None:
    sanitizing.child("torch", "cpu")
    with pytest.raises(AssertionError, match="logits_bwd_: off by"):
        sanitizing.tiles(ForgetsTheTarget(), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
def test_launch_configurations_compete(
    section: Section, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if (reason := backends.availability().get("triton", "not registered")) is not None:
        pytest.skip(reason)

    def child(command: list[str], seconds: float, each: Any) -> subprocesses.Finished:
        plan = json.loads(command[-1])
        monkeypatch.setattr(tuning, "report", lambda **fields: each(json.loads(json.dumps(fields))))
        if "share" in plan:
            each({"candidate": tuning.candidates(plan["most"])[1], "failed": "OutOfResources: shared memory"})
            tuning.compile_share(plan)
        else:
            tuning.compete({**plan, "seconds": 2.0})
        return subprocesses.Finished(0, 1.0, "")

    monkeypatch.setattr(subprocesses, "run", child)
    monkeypatch.setattr(tuning, "SMALL_SIZES", ((8, 48, 16, True), (8, 48, 16, False)))
    before = tuning.current()
    tuning.run(section)
    assert section.failures == [], section.data
    rows = section.data["rows"]
    # One that does not compile is left out.
    assert before in [row["candidate"] for row in rows]
    assert tuning.candidates(3)[1] not in [row["candidate"] for row in rows]
    assert [row["mean"] for row in rows] == sorted(row["mean"] for row in rows)
    assert section.data["won"] == rows[0]["candidate"]
    assert section.data["in_use"] == before == tuning.current()
    assert all(len(row["ms"]) == len(row["over_product"]) == 2 for row in rows)
    assert "(in use)" in capsys.readouterr().out
