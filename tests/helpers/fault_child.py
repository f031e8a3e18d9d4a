"""Runs that are killed at moments spread over everything they do to files, and two runs at once.

python fault_child.py FOLDER TRIALS; the last line of stdout is a JSON object. Runs are forked, so that the libraries
are imported once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trainer_samples import lora, make_model, make_trainer

from mopo_kernels.trainer import MOPOTrainer, last_complete_checkpoint

STEPS = 3
# What a process does to files, as Python's audit hooks tell it.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.listdir", "os.scandir")


def build(folder: Path) -> MOPOTrainer:
    return make_trainer(
        folder,
        lora(make_model(), lora_dropout=0.3),
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        reference="precomputed",
        thresholds=None,
    )


def watch(folder: Path, act: Callable[[int], None]) -> None:
    """Calls ``act`` with the number of everything that is done to files of ``folder``."""
    count, place = [0], str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments and str(arguments[0]).startswith(place):
            count[0] += 1
            act(count[0])

    sys.addaudithook(hook)


def forked(work: Callable[[], int], log: Path) -> int:
    """The process of ``work``, whose return is its exit code."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, moment: int | None = None, counted: Path | None = None) -> int:
    """One run to its end, or to its death at a moment; from the newest complete checkpoint if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [0]

    def act(number: int) -> None:
        numbers[0] = number
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, act)
    trainer = build(folder)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    weights = {name: value for name, value in trainer.model.state_dict().items() if "lora" in name}
    torch.save({"step": trainer.state.global_step, "weights": weights}, folder / "end.pt")
    if counted is not None:
        counted.write_text(str(numbers[0]))
    return 0


def two_at_once(folder: Path) -> list[str]:
    """What becomes of two runs that begin together, the first of which takes its time."""

    def slow() -> int:
        trainer = build(folder)
        real = trainer._begin_step

        def begin_step() -> None:
            (folder / "begun").touch()
            time.sleep(0.3)
            real()

        trainer._begin_step = begin_step  # type: ignore[method-assign]
        trainer.train()
        return 0

    def second() -> int:
        while not (folder / "begun").exists():
            time.sleep(0.01)
        try:
            build(folder).train()
        except ValueError as error:
            return 5 if str(error).startswith("output_dir: ") else 6
        return 0

    folder.mkdir()
    children = [forked(slow, folder / "log"), forked(second, folder / "log")]
    return sorted({0: "trained", 5: "refused"}.get(ended(child), "failed") for child in children)


def main() -> None:
    root, trials = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    assert ended(forked(lambda: train(root / "whole", counted=root / "count"), root / "log")) == 0
    moments = int((root / "count").read_text())
    trials = min(trials, moments)
    expected = torch.load(root / "whole" / "end.pt", weights_only=True)
    rng = random.Random(0)
    wrong, killed = [], 0
    for trial in range(trials):
        folder = root / f"trial-{trial}"
        moment = rng.randint(trial * moments // trials + 1, (trial + 1) * moments // trials)
        code = ended(forked(lambda folder=folder, moment=moment: train(folder, moment), root / "log"))  # type: ignore[misc]
        killed += code == -signal.SIGKILL
        # The lock of the dead is free, its half-written files count for nothing.
        if ended(forked(lambda folder=folder: train(folder), root / "log")) != 0:  # type: ignore[misc]
            wrong.append([moment, "did not resume"])
            continue
        found = torch.load(folder / "end.pt", weights_only=True)
        if found["step"] != expected["step"] or any(
            not torch.equal(value, found["weights"][name]) for name, value in expected["weights"].items()
        ):
            wrong.append([moment, "ended elsewhere"])
    together = two_at_once(root / "together")
    print(json.dumps({"trials": trials, "moments": moments, "killed": killed, "wrong": wrong, "two at once": together}))


if __name__ == "__main__":
    main()
