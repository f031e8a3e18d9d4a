"""Growth curves, errors against fp64, and the command that runs every benchmark."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mopo_kernels.cli.bench as bench_command
from bench import accuracy, figures, implementations, run, scaling_curves
from bench.implementations import BARE, IMPLEMENTATIONS, Implementation, Inputs, Result
from bench.run import BenchError, Done, Section
from mopo_kernels import cli

TINY = scaling_curves.Plan(
    hidden=64,
    tokens=64,
    vocabulary=512,
    axis_tokens=(64, 256, 1024),
    axis_vocabulary=(512, 2048),
    axis_objectives=(1, 8),
    axis_share=(0.0, 0.5),
)
PLAIN = "plain PyTorch, scored rows"


# --------------------------------------------------------------------------------------------------------------- fits


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_power_of_exact_numbers_is_found(exponent: float) -> None:
    values = [256.0, 512.0, 1024.0, 4096.0]
    assert scaling_curves.power(values, [3.0 * value**exponent for value in values]) == pytest.approx(
        exponent, abs=1e-12
    )


def test_the_power_is_that_of_least_squares_in_the_logarithms() -> None:
    """To base 2: heights of 0, 3, 0, 0 over 0, 1, 2, 3."""
    assert scaling_curves.power([1, 2, 4, 8], [1, 8, 1, 1]) == pytest.approx(-0.3)


def test_where_nothing_was_measured_there_is_no_fit() -> None:
    assert scaling_curves.power([1, 2], [0.0, 3.0]) is None
    assert scaling_curves.quotient([0.0, 3.0]) is None
    assert scaling_curves.quotient([2.0, 9.0, 3.0]) == 1.5


def test_fits_are_powers_over_n_and_v_and_quotients_over_the_others() -> None:
    def points(*values: float) -> list[dict[str, Any]]:
        return [
            {"value": value, "results": {"one": dict.fromkeys(scaling_curves.MEASURES, 5 * value**2)}}
            for value in values
        ]

    for axis, expected in (("N", 2), ("V", 2), ("K", 64), ("prompt share", 64)):
        assert scaling_curves.fits(axis, points(1, 2, 8)) == {
            "one": dict.fromkeys(scaling_curves.MEASURES, pytest.approx(expected))
        }
    assert scaling_curves.fits("K", [*points(1), {"value": 2, "results": {}}]) == {}


@pytest.mark.parametrize("plan", [scaling_curves.FULL, scaling_curves.QUICK, TINY], ids=["full", "quick", "tiny"])
def test_one_thing_moves_along_each_axis(plan: scaling_curves.Plan) -> None:
    curves = plan.curves()
    assert tuple(curves) == scaling_curves.AXES
    for axis, field in (("N", "scored"), ("V", "vocabulary"), ("K", "objectives"), ("prompt share", "prompt_share")):
        for value, work in curves[axis].items():
            expected = {
                "scored": plan.tokens,
                "vocabulary": plan.vocabulary,
                "objectives": plan.objectives,
                "prompt_share": plan.share,
                "hidden": plan.hidden,
            }
            assert {name: getattr(work, name) for name in expected} == {**expected, field: value}


def test_the_full_curves_reach_beyond_the_buffer() -> None:
    for axis in ("N", "V"):
        work = list(scaling_curves.FULL.curves()[axis].values())[-1]
        assert 4 * work.scored * work.vocabulary == 2 * implementations.BUFFER_BYTES


# ----------------------------------------------------------------------------------------------------- scaling curves


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("scaling_curves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling_curves, "QUICK", TINY)
        patch.setenv("OMP_NUM_THREADS", "1")
        scaling_curves.main(
            ["--quick", "--dtype", "float32", "--rounds", "2", "--output", str(folder / "scaling_curves.json")]
        )
    return json.loads((folder / "scaling_curves.json").read_text()), folder


def test_every_curve_has_time_and_memory_at_every_point(grown: tuple[dict[str, Any], Path]) -> None:
    record, _ = grown
    assert [(c["axis"], c["trained"]) for c in record["curves"]] == [
        (axis, trained) for trained in (True, False) for axis in scaling_curves.AXES
    ]
    for curve in record["curves"]:
        wanted = set(scaling_curves.defaults(quick=True))
        if curve["axis"] != "prompt share":
            wanted -= {scaling_curves.ALL_ROWS}
        for point in curve["points"]:
            assert point["results"].keys() - {scaling_curves.ALL_ROWS} == wanted - {scaling_curves.ALL_ROWS}
            for name, row in point["results"].items():
                assert 0 < row["p20"] <= row["seconds"] <= row["p80"]
                assert row["ratio"] == 1 if name == BARE else row["ratio"] > 0
                assert row["peak_mib"] > 0
                assert row["hwm_mib"] > row["beyond_mib"]
                assert row["memory_method"] in ("VmHWM", "ru_maxrss")
        assert curve["fits"].keys() == wanted
    assert record["difference_from_plain"].keys() == set(scaling_curves.defaults(quick=True)) - {BARE}
    assert max(record["difference_from_plain"].values()) < 1e-3
    assert record["command"].startswith("python -m bench.scaling_curves --quick --dtype float32")
    assert {"commit", "peers", "machine", "threads", "cpu_capability", "torch", "date", "rounds"} <= record.keys()


@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
def test_work_grows_with_tokens_and_with_the_prompt_where_that_is_multiplied(trained: bool) -> None:
    """Operations are counted, not timed: these calls take milliseconds. A share of half doubles all rows."""

    def operations(name: str, axis: str) -> list[int]:
        counts = []
        for work in TINY.curves()[axis].values():
            x = Inputs.make(replace(work, trained=trained), 0)
            with FlopCounterMode(display=False) as counter:
                IMPLEMENTATIONS[name].run(x)
            counts.append(counter.get_total_flops())
        return counts

    for name in (BARE, PLAIN, scaling_curves.ALL_ROWS):
        few, *_, many = operations(name, "N")
        assert many / few == max(TINY.curves()["N"]) / min(TINY.curves()["N"])
    none, half = operations(scaling_curves.ALL_ROWS, "prompt share")
    assert half == 2 * none > 0
    none, half = operations(PLAIN, "prompt share")
    assert half == none > 0


def test_memory_grows_with_the_prompt_where_that_is_multiplied(grown: tuple[dict[str, Any], Path]) -> None:
    record, _ = grown
    for curve in record["curves"]:
        if curve["axis"] == "prompt share":
            assert curve["fits"][scaling_curves.ALL_ROWS]["peak_mib"] == pytest.approx(2, rel=0.2)
            assert curve["fits"][PLAIN]["peak_mib"] == pytest.approx(1, rel=0.1)


def test_the_picture_is_a_png_of_every_axis(
    grown: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record, folder = grown
    assert (folder / "scaling_curves_float32.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or path)
    figures.plot_scaling_curves(record, "float32", tmp_path / "f.png")
    grid = drawn[0].axes
    assert len(grid) == 3 * len(scaling_curves.AXES)
    assert [axes.get_xlabel() for axes in grid[-4:]] == list(figures._LABELS.values())
    lines = {line.get_label(): line for line in grid[0].get_lines()}
    points = record["curves"][0]["points"]
    np.testing.assert_allclose(
        lines[PLAIN].get_xydata(), [[point["value"], point["results"][PLAIN]["seconds"]] for point in points]
    )
    assert f"{PLAIN}, head frozen" in lines
    # No two lines of a panel look the same.
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines.values()]
    assert len(set(looks)) == len(looks)


def test_the_high_water_mark_is_that_of_the_call_alone() -> None:
    """At the same work twice, a larger one between: what that took is not in the other's."""
    small = TINY.work(1024, 2048, 2, 0.0)
    first, large, again = scaling_curves.high_water(PLAIN, [small, replace(small, vocabulary=8192), small])
    if first["memory_method"] != "VmHWM":
        pytest.skip("the high-water mark cannot be reset here")
    # Logits of 8 and 32 MiB: at least two of them are alive at once.
    assert 16 < first["beyond_mib"] < 48
    assert large["beyond_mib"] == pytest.approx(4 * first["beyond_mib"], rel=0.25)
    assert again["beyond_mib"] == pytest.approx(first["beyond_mib"], rel=0.25)


def test_an_implementation_whose_process_fails_stops_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"nobody: its process ended with status 1: KeyError: 'nobody': nothing is"):
        scaling_curves.high_water("nobody", [])
    monkeypatch.setattr(scaling_curves, "PATIENCE", 0.01)
    with pytest.raises(SystemExit, match=r"bare products: its process took more than 0 s"):
        scaling_curves.high_water(BARE, [])


def test_one_that_disagrees_stops_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(x: Inputs) -> Result:
        loss, *gradients = implementations.plain_compacted(x)
        return loss, *(gradient / 2 for gradient in gradients)

    monkeypatch.setitem(IMPLEMENTATIONS, PLAIN, replace(IMPLEMENTATIONS[PLAIN], run=half))
    with pytest.raises(SystemExit, match=f"{PLAIN} disagrees with plain PyTorch"):
        scaling_curves.explore(TINY, [BARE, PLAIN], ["float32"], 2, scaling_curves.Console(quiet=True))


@pytest.mark.parametrize("module", [scaling_curves, accuracy], ids=["scaling_curves", "accuracy"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--implementations", "nobody"), "no implementation is called like 'nobody'"),
        (("--output", "."), "--output: expected a file to write; got the folder ."),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_before_anything_is_measured(
    module: Any, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        module.main(list(arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_no_draw_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--draws", "0"])
    assert "argument --draws: expected at least 1; got 0" in capsys.readouterr().err


def test_fewer_than_two_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling_curves.main(["--rounds", "1"])
    assert "argument --rounds: expected at least 2; got 1" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- accuracy

SMALL = replace(accuracy.SMALL, hidden=32, vocabulary=301, length=14)


@pytest.mark.parametrize("loss", ["regression", "DPO"])
@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
def test_the_truth_is_in_fp64_and_of_that_loss(loss: str, trained: bool) -> None:
    x = Inputs.make(replace(SMALL, trained=trained), 0)
    exact = accuracy.truth(x, loss)
    assert {value.dtype for value in exact} == {torch.float64}
    assert len(exact) == 2 + trained
    plain = implementations.plain_dpo if loss == "DPO" else implementations.plain_compacted
    got = accuracy.error(plain(x), exact)
    assert 1e-9 < got["gradient"] < 1e-4
    assert got["loss"] < 1e-4


def test_an_error_is_the_larger_one_of_the_gradients_and_a_multiple_of_plain_pytorchs() -> None:
    def rounded(x: Inputs) -> Result:
        loss, first, second = implementations.plain_compacted(x)
        return loss * 1.5, first, second * 1.01

    found = accuracy.errors(
        SMALL,
        {
            BARE: IMPLEMENTATIONS[BARE],
            "plain": IMPLEMENTATIONS[PLAIN],
            "rounded": Implementation(rounded, implementations.plain_compacted),
            "DPO": Implementation(implementations.plain_dpo, implementations.plain_dpo, "DPO"),
        },
    )
    assert found.keys() == {"plain", "rounded", "DPO"}
    assert found["plain"]["times_plain"] == found["DPO"]["times_plain"] == 1
    assert found["rounded"]["loss"] == pytest.approx(0.5, rel=1e-3)
    assert found["rounded"]["gradient"] == pytest.approx(0.01, rel=1e-3)
    assert found["rounded"]["times_plain"] == pytest.approx(0.01 / found["plain"]["gradient"], rel=1e-3)


def test_an_error_is_the_root_mean_square_over_the_draws() -> None:
    (found,) = accuracy.errors(SMALL, {PLAIN: IMPLEMENTATIONS[PLAIN]}, draws=3).values()
    each = [
        accuracy.error(implementations.plain_compacted(x), accuracy.truth(x, "regression"))
        for x in (Inputs.make(SMALL, seed) for seed in range(3))
    ]
    assert len({one["gradient"] for one in each}) == 3
    for key in ("loss", "gradient"):
        assert found[key] == pytest.approx((sum(one[key] ** 2 for one in each) / 3) ** 0.5)


def test_accuracy_writes_every_implementation_in_every_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "SMALL", SMALL)
    output = tmp_path / "accuracy.json"
    accuracy.main(["--implementations", "mopo_kernels torch", "all rows", "QuACK", "--output", str(output)])
    record = json.loads(output.read_text())
    assert [(group["dtype"], group["trained"]) for group in record["groups"]] == list(
        scaling_curves.groups(scaling_curves.DTYPES)
    )
    for group in record["groups"]:
        assert {"mopo_kernels torch", "plain PyTorch, all rows"} <= group["results"].keys()
        assert all(row["gradient"] > 0 for row in group["results"].values())
    assert "QuACK" in record["unavailable"]
    assert "mopo_kernels torch" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- run

# Stands for a section: `python -m bench.scripted WHAT --output FILE` becomes `python -c SCRIPT WHAT --output FILE`.
SCRIPT = """
import json, sys, time
what, output = sys.argv[1], sys.argv[3]
if what == "fails": sys.exit("first line\\nthere is no [memory] left")
if what == "hangs":
    import subprocess
    deaf = "import os, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    deaf += "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    subprocess.Popen([sys.executable, "-S", "-c", deaf, output]).wait()
open(output, "w").write("{}")
print("table of", what)
print(json.dumps({}))
"""


@dataclasses.dataclass(frozen=True)
class Scripted(Section):
    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-S", "-c", SCRIPT, self.name, "--output", str(folder / f"{self.name}.json")]


@pytest.fixture
def green(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "require_parity", lambda tests: "9 passed")
    yield
    signal.signal(signal.SIGTERM, handler)


def scripted(*names: str) -> tuple[Section, ...]:
    return tuple(Scripted(name, "scripted") for name in names)


def test_nothing_is_reported_when_a_parity_test_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_red.py").write_text("def test_green(): pass\n\ndef test_red(): assert 1 == 2\n")

    def never(*arguments: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(run, "PARITY", (str(tmp_path / "test_red.py"),))
    monkeypatch.setattr(run, "run_sections", never)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    assert run.main(["--quick", "--output", str(tmp_path / "out")]) == 1
    printed = capfd.readouterr()
    assert printed.out == ""
    (_, line) = printed.err.splitlines()
    assert line.startswith("parity tests are not green, nothing is reported: 1 failed, 1 passed in")
    assert not list((tmp_path / "out").iterdir())


def test_green_tests_are_reported_in_a_line_and_missing_ones_are_red(tmp_path: Path) -> None:
    (tmp_path / "test_green.py").write_text("def test_green(): pass\n")
    assert "1 passed" in run.require_parity([str(tmp_path / "test_green.py")])
    with pytest.raises(BenchError, match="nothing is reported"):
        run.require_parity([f"{tmp_path / 'test_green.py'}::test_of_that_name"])


def test_the_parity_tests_are_there() -> None:
    for test in run.PARITY:
        file, name = test.split("::")
        assert f"\ndef {name}(" in (run.ROOT / file).read_text(encoding="utf-8")


@pytest.mark.usefixtures("green")
def test_a_section_that_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "FULL", scripted("one", "fails", "two"))
    assert run.main(["--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "table of one\n" in printed.out
    assert "table of two\n" in printed.out
    assert "{}" not in printed.out
    *_, failure, total = printed.err.splitlines()
    assert failure == "fails failed: exit code 1: there is no [memory] left"
    assert total.startswith("2 of 3 sections in ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


@pytest.mark.usefixtures("green")
def test_when_all_went_well_the_code_is_0_and_only_those_asked_for_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "FULL", scripted("one", "fails", "two"))
    assert run.main(["--only", "two", "--output", str(tmp_path / "new" / "folder")]) == 0
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["two.json"]
    assert "table of one" not in capsys.readouterr().out


@pytest.mark.usefixtures("green")
def test_without_valgrind_instructions_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.instructions, "reason_not_to_count", lambda: "valgrind is not installed")
    assert run.main(["--only", "instructions", "--output", str(tmp_path)]) == 0
    assert "1 of 1: instructions left out: valgrind is not installed\n" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_an_interrupted_run_leaves_no_process_behind(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    program = (
        # Where tests run in the background, shells have SIGINT ignored.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.path.insert(0, 'tests/bench'); from bench import run; import test_run as here\n"
        "run.FULL = here.scripted('hangs'); run.require_parity = lambda tests: ''\n"
        f"sys.exit(run.run_command(['--output', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=run.ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    inner = tmp_path / "hangs.json"
    deadline = time.monotonic() + 300
    while not (inner.exists() and inner.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in stderr
    if sent == signal.SIGINT:
        assert stderr.splitlines()[-1] == "mopo: interrupted"
    # The section's own process has been waited for; what it had started is ended, if not yet collected.
    status = Path(f"/proc/{inner.read_text()}/status")
    deadline = time.monotonic() + 120
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_how_a_process_ended_is_told_in_one_line() -> None:
    assert Done(-9, "", "").reason() == "ended by SIGKILL"
    assert Done(3, "out", "first\nlast  of all\n").reason() == "exit code 3: last of all"
    assert Done(3, "out\n", "").reason() == "exit code 3: out"


def test_the_table_of_the_head_holds_ratio_memory_and_error_of_every_implementation() -> None:
    row = {"loss": "regression", "seconds": 1.5, "p20": 1.0, "p80": 2.0, "ratio": 1.07, "peak_mib": 300.0}
    work = dict(scored=8, hidden=4, vocabulary=16, objectives=2, trained=False, dtype="torch.float32")
    record = {
        "workload": work,
        "results": {BARE: {**row, "loss": "none"}, "one": row, "two": {**row, "loss": "DPO"}},
        "threads": 2,
        "rounds": 3,
    }
    wrong = {"gradient": 1.0, "times_plain": 9.0}
    measured = {
        "groups": [
            {"dtype": "float32", "trained": True, "results": {"one": wrong}},
            {"dtype": "bfloat16", "trained": False, "results": {"one": wrong}},
            {"dtype": "float32", "trained": False, "results": {"one": {"gradient": 2e-6, "times_plain": 1.02}}},
        ]
    }

    def rows(found: dict[str, Any] | None) -> list[tuple[str, ...]]:
        return list(zip(*(column._cells for column in run.head_table(record, found).columns), strict=True))

    assert rows(measured) == [
        (BARE, "1.07", "1.500", "300", "-", "-"),
        ("one", "1.07", "1.500", "300", "2.0e-06", "1.02"),
        ("two (its own loss, DPO)", "1.07", "1.500", "300", "-", "-"),
    ]
    assert rows(None)[1][-2:] == ("-", "-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nothing"), "argument --only: invalid choice: 'nothing'"),
        (("--quick", "--only", "instructions"), "argument --only: with --quick there is no instructions"),
        (("--fast",), "unrecognized arguments: --fast"),
        (("--output", "/dev/null/folder"), "argument --output: cannot make the folder"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.run_command(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mopo: error: {message}")


def test_benchmarks_take_the_arguments_that_their_sections_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are read, as each stops at no more than the implementation that is added; instructions have none."""
    for sections in (run.FULL, run.QUICK):
        assert len({section.name for section in sections}) == len(sections)
        for section in sections:
            _, _, module, *arguments = section.command(tmp_path)
            assert arguments[-2:] == ["--output", str(tmp_path / f"{section.name}.json")]
            if section.module != "instructions":
                with pytest.raises(SystemExit):
                    importlib.import_module(module).main([*arguments, "--implementations", "nobody"])
                assert "no implementation is called like 'nobody'" in capsys.readouterr().err
    assert {section.name for section in run.QUICK} <= {section.name for section in run.FULL}


def test_outside_a_clone_one_line_says_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command, "CLONE", tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    assert capsys.readouterr().err == "mopo: error: mopo bench runs from a clone of the repository\n"


def test_in_a_clone_the_command_runs_its_benchmarks_and_leaves_the_import_path_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, though it has a package of that name (since Python 3.11); the exit code is the benchmarks'."""
    assert bench_command.CLONE == run.ROOT
    monkeypatch.setattr(os, "execve", lambda *arguments: None)
    path = list(sys.path)
    bench_command.run_benchmarks(["--quick"])
    assert sys.path == path
    if sys.version_info >= (3, 11):
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "__init__.py").touch()
    program = "import sys; from mopo_kernels import cli; sys.exit(cli.main(['bench', *sys.argv[1:]]))"

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(run.ROOT), "PYTHONSAFEPATH": "1"}
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = command("--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mopo bench")
    done = command("--only", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("mopo: error: argument --only: invalid choice: 'nothing'")
