"""The benchmark compares like with like: implementations that run agree with plain PyTorch, the others say why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import head
from bench import implementations as registry
from bench.implementations import BARE, IMPLEMENTATIONS, Implementation, Inputs, Result, Workload, available

ROOT = Path(__file__).parents[2]
# A vocabulary that no block divides, three objectives, prompts half of every row.
SMALL = Workload(hidden=32, vocabulary=301, prompts=3, length=14, objectives=3)
COMPARED = [name for name in IMPLEMENTATIONS if name != BARE]


def implementation(name: str) -> Implementation:
    """The implementation, or a skip that says why it cannot run here."""
    if (reason := IMPLEMENTATIONS[name].unavailable()) is not None:
        pytest.skip(reason)
    return IMPLEMENTATIONS[name]


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled implementations traced but not built: seconds each, and what is built is another test's matter."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    registry._compiled_logprob.cache_clear()
    yield
    registry._compiled_logprob.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("name", COMPARED)
def test_every_implementation_that_runs_agrees_with_plain_pytorch(
    name: str, trained: bool, dtype: torch.dtype, quick_compile: None
) -> None:
    work = replace(SMALL, trained=trained, dtype=dtype)
    errors = head.check(work, {name: implementation(name)})
    assert 0 <= errors[name] < head.TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name in COMPARED if "compiled" in name])
def test_compiled_implementations_agree_when_built_and_are_built_once(name: str) -> None:
    chosen = implementation(name)
    torch._dynamo.reset()
    assert head.check(SMALL, {name: chosen})[name] < 1e-3
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 4):
            chosen.run(Inputs.make(SMALL, seed))


def _without_a_token(x: Inputs) -> Result:
    labels = x.labels.clone()
    labels[0, -1] = -100
    return registry.plain_compacted(replace(x, labels=labels))


def _without_an_objective(x: Inputs) -> Result:
    return registry.plain_compacted(replace(x, objective_weight=torch.tensor([1.0, 1.0, 0.0])))


def _pair_turned_round(x: Inputs) -> Result:
    return registry.plain_compacted(replace(x, pairs=torch.cat([x.pairs[:1].flip(1), x.pairs[1:]])))


def _half_a_gradient(x: Inputs) -> Result:
    loss, *gradients = registry.plain_compacted(x)
    return loss, *gradients[:-1], gradients[-1] / 2


def _not_a_number(x: Inputs) -> Result:
    return tuple(value * torch.nan for value in registry.plain_compacted(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrong",
    [
        _without_a_token,
        _without_an_objective,
        _pair_turned_round,
        _half_a_gradient,
        _not_a_number,
        registry.plain_dpo,
    ],
    ids=lambda run: run.__name__,
)
def test_an_implementation_that_does_other_work_is_refused(
    wrong: Callable[[Inputs], Result], dtype: torch.dtype
) -> None:
    work = replace(SMALL, dtype=dtype)
    with pytest.raises(SystemExit, match="wrong disagrees with plain PyTorch by"):
        head.check(work, {"wrong": Implementation(wrong, registry.plain_compacted)})


def test_another_loss_is_held_against_plain_pytorch_with_that_loss() -> None:
    assert head.check(SMALL, {"dpo": Implementation(registry.plain_dpo, registry.plain_dpo, "DPO")})["dpo"] == 0
    with pytest.raises(SystemExit, match="disagrees"):
        head.check(SMALL, {"ipo": Implementation(registry.plain_compacted, registry.plain_dpo, "DPO")})


def test_nothing_is_dropped_in_silence() -> None:
    runs, reasons = available()
    assert runs.keys() | reasons.keys() == IMPLEMENTATIONS.keys()
    assert not runs.keys() & reasons.keys()
    for name in ("cut-cross-entropy", "QuACK"):
        assert "GPU" in reasons[name] or "CUDA" in reasons[name]
    assert all(reason.strip() and "\n" not in reason for reason in reasons.values())


def test_without_any_peer_the_rest_still_runs_and_each_peer_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("trl.trainer.utils", "liger_kernel.chunked_loss", "cut_cross_entropy", "quack"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    registry.import_error.cache_clear()
    try:
        head.main([*TINY, "--output", str(tmp_path / "head.json")])
    finally:
        registry.import_error.cache_clear()
    record = json.loads((tmp_path / "head.json").read_text())
    for part, word in (
        ("TRL", "trl.trainer.utils"),
        ("Liger", "liger_kernel.chunked_loss"),
        ("cut-cross-entropy", "cut_cross_entropy"),
        ("QuACK", "quack"),
        ("F.linear_cross_entropy", "2.13"),
        ("plain PyTorch, scored rows, compiled", "no-such-compiler"),
    ):
        missing = {name: reason for name, reason in record["unavailable"].items() if name.startswith(part)}
        assert missing
        assert all(word in reason for reason in missing.values())
    assert {BARE, "mopo_kernels torch", "plain PyTorch, scored rows"} <= record["results"].keys()


TINY = ("--hidden", "16", "--vocabulary", "67", "--prompts", "2", "--length", "8", "--rounds", "2")


def test_the_command_prints_every_implementation_and_writes_the_json(tmp_path: Path) -> None:
    output = tmp_path / "head.json"
    chosen = ("mopo", "rows", "chunks", "cut", "QuACK")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "no-such-compiler"}
    command = [sys.executable, "-m", "bench.head", *TINY, "--frozen", "--dtype", "bfloat16"]
    child = subprocess.run(
        [*command, "--output", str(output), "--implementations", *chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert "USDT" not in child.stdout + child.stderr
    record = json.loads(output.read_text())
    assert record == json.loads(child.stdout.splitlines()[-1])
    assert record["results"].keys() | record["unavailable"].keys() == IMPLEMENTATIONS.keys()
    for name in IMPLEMENTATIONS:
        assert name in child.stdout
    for name, row in record["results"].items():
        assert 0 < row["p20"] <= row["seconds"] <= row["p80"]
        assert row["ratio"] > 0
        assert row["peak_mib"] > 0
        if name != BARE:
            assert record["difference_from_plain"][name] < head.TOLERANCE[torch.bfloat16]
    assert record["results"][BARE]["ratio"] == 1
    assert record["results"]["plain PyTorch, scored rows"]["loss"] == "regression"
    assert record["workload"]["dtype"] == "torch.bfloat16"
    assert record["workload"]["trained"] is False
    assert record["torch"] == torch.__version__
    assert {"commit", "peers", "machine", "threads", "cpu_capability", "date"} <= record.keys()
    for name, row in record["results"].items():
        if name.startswith("Liger"):
            assert row["loss"] == "DPO"
            assert f"{name}: its own loss, DPO" in child.stdout


def test_only_the_implementations_asked_for_run_and_the_bare_products_always() -> None:
    runs, reasons = available(("scored rows", "QuACK"))
    assert BARE in runs
    assert all("scored rows" in name for name in runs.keys() - {BARE})
    assert reasons.keys() == {"QuACK"} | {name for name in reasons if "scored rows" in name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--implementations", "nobody"), "no implementation is called like 'nobody'"),
        (("--rounds", "1"), "argument --rounds: expected at least 2; got 1"),
        *(
            ((f"--{name}", "0"), f"argument --{name}: expected at least 1; got 0")
            for name in ("hidden", "vocabulary", "prompts", "length", "objectives")
        ),
        (("--dtype", "float16"), "invalid choice: 'float16'"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_with_one_line(
    arguments: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        head.main(list(arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("place", "message"), [("", "got the folder"), ("file/head.json", "cannot make the folder")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(head, "check", never)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        head.main(["--output", str(tmp_path / place)])
    assert stop.value.code == 2
    assert f"--output: {'expected a file to write; ' * (not place)}{message}" in capsys.readouterr().err


def test_the_peak_of_memory_is_that_of_the_call() -> None:
    """Two tensors of 1 MiB held together, then one of 3 MiB alone: 3 MiB, of which nothing stays."""

    def call() -> torch.Tensor:
        both = torch.empty(1 << 18), torch.empty(1 << 18)
        del both
        return torch.empty(3 << 18)

    assert head.peak_mib(call) == pytest.approx(3, rel=0.01)


def test_inputs_are_fresh_for_every_seed_and_the_same_for_one() -> None:
    first, again, other = (Inputs.make(SMALL, seed) for seed in (0, 0, 1))
    assert torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.hidden, other.hidden)
    assert int((first.labels[:, 1:] != -100).sum()) == SMALL.scored
    rounded = Inputs.make(replace(SMALL, dtype=torch.bfloat16), 0)
    assert torch.equal(rounded.in_fp32().weight, rounded.weight.float())
    assert [leaf.dtype for leaf in rounded.in_fp32().leaves()] == [torch.float32] * 2
