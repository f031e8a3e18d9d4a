"""Whole steps are compared like with like: same rows, same first loss and gradient, each trainer in its process."""

from __future__ import annotations

import json
import mmap
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import step
from bench.step import IMPLEMENTATIONS, Implementation, Meter, Work

TINY = Work(shape="tiny", pairs=2, length=24)
RUNNABLE = [name for name, one in IMPLEMENTATIONS.items() if one.unavailable(TINY) is None]
# transformers renames gradient checkpointing; TRL 1.16 and older releases know it by that name only.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6.*:FutureWarning")


def silent(text: str) -> None:
    """Says nothing."""


# ------------------------------------------------------------------------------------------------------- real trainers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    step.make_model("tiny", folder)
    return str(folder)


def first_steps(implementation: Implementation, work: Work, model: str, folder: Path) -> list[dict[str, Any]]:
    """Its answers to one step of each prompt share, the trainer in this process."""
    trainer = step.make_trainer(implementation, work, 0, model, str(folder))
    answers: list[dict[str, Any]] = []
    trainer.add_callback(step.turns(trainer, Meter("cpu"), answers.append, lambda: True))
    trainer.train()
    return answers[1:]


@pytest.mark.parametrize(
    ("tuning", "names"),
    [
        ("full", RUNNABLE),
        ("LoRA", ["mopo_kernels", "TRL, defaults"]),
    ],
    ids=step.TUNINGS[::-1],
)
def test_all_that_run_agree_and_another_beta_is_refused(
    tuning: str, names: list[str], model: str, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    work = replace(TINY, tuning=tuning)
    firsts = {
        name: first_steps(IMPLEMENTATIONS[name], work, model, tmp_path / f"{number}")
        for number, name in enumerate(names)
    }
    losses = {name: IMPLEMENTATIONS[name].loss for name in names}
    found = step.disagreement(firsts, losses, step.TOLERANCE["float32"])
    assert max(found.values()) < 1e-5
    other = replace(IMPLEMENTATIONS["TRL, fastest"], settings={**step.TRL, "beta": 1.05 * step.BETA})
    firsts["other beta"] = first_steps(other, work, model, tmp_path / "other")
    with pytest.raises(SystemExit, match=r"other beta disagrees with mopo_kernels by .*: nothing is reported"):
        step.disagreement(firsts, {**losses, "other beta": "DPO"}, step.TOLERANCE["float32"])


MINE = ("mopo_kernels", "mopo_kernels, a row a response", "mopo_kernels, two rows a pair")


def test_several_responses_to_a_prompt_are_the_same_pairs_for_all(model: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    work = replace(TINY, pairs=6, responses=3)
    assert work.prompts == 2
    firsts = {
        name: first_steps(IMPLEMENTATIONS[name], work, model, tmp_path / f"{number}")
        for number, name in enumerate((*MINE, "TRL, fastest"))
    }
    found = step.disagreement(firsts, dict.fromkeys(firsts, "DPO"), step.TOLERANCE["float32"])
    assert max(found.values()) < 1e-5


def test_the_pairs_of_a_file(model: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    step.make_tokenizer(1000).save_pretrained(model)
    file = tmp_path / "pairs.jsonl"
    label = {"a": 0.0, "b": 1.0}
    examples = [
        {"prompt": f"w{i} w7", "responses": ["w8 w9", "w10", "w11 w12 w13"], "pairs": pairs}
        for i, pairs in enumerate(
            [
                [{"i": 0, "j": 1, "preference": label}, {"i": 2, "j": 1, "preference": label}],
                [{"i": 0, "j": 1, "preference": {"a": 0.5}}, {"i": 1, "j": 2, "preference": {"a": None}}],
            ]
        )
    ]
    examples.insert(1, {**examples[0], "responses": ["w8", "w9"]})
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    work = replace(TINY, pairs=3, responses=3, shares=(0.5,), data=str(file))
    made = step.prompts(work, 1000, 1)
    assert [one.text for one in made] == ["w0 w7", "w1 w7"]
    assert made[0].wins == {(0, 1): False, (0, 2): True, (1, 2): True}
    assert made[1].wins == dict.fromkeys(made[0].wins, True)
    assert step.prompt_share(file, Path(model), 3) == round(12 / 24, 2)
    firsts = {
        name: first_steps(IMPLEMENTATIONS[name], work, model, tmp_path / f"{number}")
        for number, name in enumerate((*MINE, "TRL, fastest"))
    }
    found = step.disagreement(firsts, dict.fromkeys(firsts, "DPO"), step.TOLERANCE["float32"])
    assert max(found.values()) < 1e-5
    with pytest.raises(SystemExit, match=r"expected 3 prompts with 3 responses; .* has 2"):
        step.prompts(work, 1000, 2)


def test_the_demo_is_its_model_and_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(step, "ensure_model", lambda folder: tmp_path / "model")
    monkeypatch.setattr(step, "prompt_share", lambda data, model, responses: 0.4)
    monkeypatch.setattr(
        step, "measure", lambda *job: seen.append(job) or {"results": {}, "failed": {}, "unavailable": {}}
    )
    step.main(["--demo", "--output", str(tmp_path / "o.json")])
    ((work, _, _, _, folder),) = seen
    assert folder == str((tmp_path / "model").resolve())
    assert (work.responses, work.prompts, work.shares) == (4, 2, (0.4,))
    assert len(step.prompts(work, 0, 3)) == 8
    assert json.loads((tmp_path / "o.json").read_text())["workload"]["data"] == "preferences.jsonl"


def test_an_implementation_waits_before_every_step_and_after_the_last(model: str, tmp_path: Path) -> None:
    """What a trainer does at its end must not fall into another one's turn."""
    trainer = step.make_trainer(IMPLEMENTATIONS["mopo_kernels"], TINY, 0, model, str(tmp_path))
    events: list[str] = []

    def wait() -> bool:
        events.append("wait")
        return True

    trainer.add_callback(step.turns(trainer, Meter("cpu"), lambda answer: events.append("answer"), wait))
    trainer.train()
    assert events == ["answer", "wait"] * (1 + len(TINY.shares))


def test_the_quick_run_reports_every_figure_and_every_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "step.json"
    step.main(["--quick", "--tuning", "LoRA", "--output", str(output)])
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record == json.loads(printed.splitlines()[-1])
    assert record["results"].keys() == {"LoRA"}
    results = record["results"]["LoRA"]
    assert results.keys() == {"mopo_kernels", "TRL, fastest"}
    assert results.keys() | record["unavailable"].keys() == set(step.QUICK)
    for name, reason in record["unavailable"].items():
        assert f"{name}: cannot run here: {reason}" in printed
    assert "need a GPU" in record["unavailable"]["TRL, Liger's layers"]
    for name, row in results.items():
        assert name in printed
        assert row["first_steps_differ"] < 1e-5
        assert row["compared_with"] == "mopo_kernels"
        assert row["settings"]["trainer"] in ("mopo", "trl")
        assert row["settings"]["per_device_train_batch_size"] == 2
        assert row["settings"]["gradient_checkpointing"] is False
        assert row["settings"]["lora"] == step.LORA
        assert row["trained_parameters"] == results["mopo_kernels"]["trained_parameters"] > 0
        assert row["by_prompt_share"].keys() == {"0.5", "0.8"}
        for part in row["by_prompt_share"].values():
            assert 0 < part["p20"] <= part["seconds"] <= part["p80"]
            assert part["peak_mib"] > part["beyond_mib"] >= 0
            assert part["scored"] < part["tokens"]
            assert part["tokens_per_second"] == pytest.approx(part["tokens"] / part["seconds"])
    for share, half in (("0.5", 0.5), ("0.8", 0.8)):
        counts = {
            (row["by_prompt_share"][share]["tokens"], row["by_prompt_share"][share]["scored"])
            for row in results.values()
        }
        ((tokens, scored),) = counts
        assert scored / tokens == pytest.approx(1 - half, abs=0.1)
    assert results["mopo_kernels"]["by_prompt_share"]["0.5"]["ratio"] == 1
    assert results["TRL, fastest"]["settings"]["precompute_ref_log_probs"] is True
    assert record["failed"] == {"LoRA": {}}
    assert record["command"] == f"python -m bench.step --quick --tuning LoRA --output {output}"
    assert record["workload"]["dtype"] == "float32"
    assert record["threads"] == 1
    assert record["torch"] == torch.__version__
    assert {"trl", "transformers", "peft"} <= record["peers"].keys()
    assert {"commit", "machine", "cpu_capability", "device", "date", "rounds"} <= record.keys()


# ------------------------------------------------------------------------------------------------------ the processes

# Stands for `step.child`, and does with `about` what its name says.
SCRIPT = """
import json, os, sys
def answer(**message): print(json.dumps(message), flush=True)
about = json.loads(sys.stdin.readline())["implementation"]["about"]
if about == "stops with an error": answer(error="ValueError: too large"); sys.exit()
if about == "exits": sys.exit("first line\\nno memory is left")
answer(before_mib=10.0, threads=os.getpid(), trained=7)
for number, _ in enumerate(sys.stdin):
    if about == "is killed" and number == 3: os.kill(os.getpid(), 9)
    if about == "falls silent" and number == 3: continue
    seconds = (2.0 if about == "is slow" else 1.0) * (9 if number < 2 else 1)  # warming up
    answer(seconds=seconds, peak_mib=30.0, method="VmHWM", tokens=8, scored=4,
           loss=2.0 if about == "has another loss" else float("nan") if about == "has no loss" else 1.0,
           grad_norm=1.1 if about == "has another gradient" else float("nan") if about == "has no gradient" else 1.0,
           rows="other" if about == "has other rows" else "same")
"""


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CHILD", [sys.executable, "-S", "-c", SCRIPT])


def take_turns(*abouts: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    implementations = {about: Implementation("scripted", about=about) for about in abouts}
    return step.take_turns(TINY, implementations, 2, "no model", silent)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ("stops with an error", "ValueError: too large"),
        ("exits", "its process ended with code 1 no memory is left"),
        ("is killed", "its process was ended by SIGKILL"),
        ("falls silent", "gave no answer within 1 s"),
    ],
)
@pytest.mark.timeout(60)
@pytest.mark.usefixtures("scripted")
def test_one_that_dies_is_reported_in_a_line_and_the_others_go_on(
    about: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if about == "falls silent":
        monkeypatch.setattr(step, "PATIENCE", 1.0)
    results, failed = take_turns(about, "is well", "is slow")
    assert failed == {about: reason}
    assert results.keys() == {"is well", "is slow"}
    assert results["is slow"]["compared_with"] == "is well"
    for part in results["is slow"]["by_prompt_share"].values():
        assert (part["seconds"], part["ratio"], part["tokens_per_second"]) == (2, 2, 4)
        assert (part["p20"], part["p80"]) == (2, 2)
        assert (part["peak_mib"], part["beyond_mib"]) == (30, 20)


@pytest.mark.usefixtures("scripted")
def test_what_stopped_and_what_cannot_run_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        step,
        "IMPLEMENTATIONS",
        {
            "one": Implementation("scripted", about="is well"),
            "two": Implementation("scripted", about="is killed"),
            "three": Implementation("scripted", unavailable=lambda work: "there is no [third] one"),
        },
    )
    monkeypatch.setattr(step, "make_model", lambda shape, folder: None)
    step.main(
        ["--tuning", "full", "--rounds", "2", "--implementations", "t", "one", "--output", str(tmp_path / "o.json")]
    )
    printed = capsys.readouterr().out
    assert "two (full): stopped: its process was ended by SIGKILL\n" in printed
    assert "three: cannot run here: there is no [third] one\n" in printed
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["results"]["full"].keys() == {"one"}
    assert record["failed"] == {"full": {"two": "its process was ended by SIGKILL"}}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("has another loss", "disagrees with is well by 1.0e.00"),
        ("has another gradient", "disagrees with is well by 1.0e-01"),
        ("has no loss", "disagrees with is well by nan"),
        ("has no gradient", "disagrees with is well by nan"),
        ("has other rows", "trained on other rows than is well"),
    ],
)
@pytest.mark.usefixtures("scripted")
def test_nothing_is_reported_when_first_steps_differ(about: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f"{about} {message}: nothing is reported"):
        take_turns("is well", about)


@pytest.mark.usefixtures("scripted")
def test_no_process_is_left_behind() -> None:
    results, _ = take_turns("is well", "is slow")
    for row in results.values():
        # The script gives its process's number there.
        with pytest.raises(ProcessLookupError):
            os.kill(row["threads"], 0)


# --------------------------------------------------------------------------------------------------- rows and memory


def test_rows_are_ragged_and_have_the_share_of_prompt_asked_for() -> None:
    work = Work(pairs=40, length=100, shares=(0.5, 0.8))
    made = step.prompts(work, 1000, 1)
    assert made == step.prompts(work, 1000, 1)
    for number, share in enumerate(work.shares):
        batch = made[number * work.pairs : (number + 1) * work.pairs]
        # With the EOS token that both trainers add.
        lengths = [(len(one.text.split()), *(1 + len(text.split()) for text in one.responses)) for one in batch]
        longest = [prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths]
        assert longest[0] == work.length == max(longest)
        assert min(longest) >= work.length // 2
        assert len(set(longest)) > 10
        assert all(
            prompt / total == pytest.approx(share, abs=0.02)
            for (prompt, _, _), total in zip(lengths, longest, strict=True)
        )
        assert {chosen > rejected for _, chosen, rejected in lengths} == {True, False}


def test_the_peak_is_that_of_the_step_and_comes_down_again() -> None:
    meter = Meter("cpu")
    peaks = []
    for mib in (96, 32):
        meter.start()
        before = meter.held_mib()
        # Straight from the system: the heap may hold freed memory that other tests left.
        with mmap.mmap(-1, mib << 20) as block:
            for page in range(0, mib << 20, mmap.PAGESIZE):
                block[page] = 1
        _, peak = meter.stop()
        peaks.append(peak - before)
    if meter.method != "VmHWM":
        pytest.skip(f"the high-water mark cannot be reset here: {meter.method}")
    assert peaks == pytest.approx([96, 32], abs=4)


def test_without_a_high_water_mark_the_greatest_resident_size_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    meter = Meter("cpu")
    meter.start()
    _, peak = meter.stop()
    assert meter.method == "ru_maxrss"
    assert peak == pytest.approx(meter.held_mib())
    assert peak > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--implementations", "nobody"), "no implementation is called like 'nobody'"),
        (("--rounds", "1"), "--rounds: expected at least 2; got 1"),
        (("--prompt_share", "1.0"), "--prompt_share: expected numbers between 0 and 1; got [1.0]"),
        (
            ("--pairs", "4", "--responses", "3"),
            "--pairs: expected a multiple of the pairs that 3 responses make; got 4",
        ),
        (("--data", "pairs.jsonl"), "--data: takes --model"),
        (("--model", ".", "--data", "none.jsonl"), "--data: there is no file none.jsonl"),
        (("--dtype", "float16"), "invalid choice: 'float16'"),
        (("--shape", "tiny", "--model", "."), "not allowed with argument"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_with_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        step.main(list(arguments))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_gpu_is_asked_for_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])
    assert "there is no CUDA device here" in capsys.readouterr().err
