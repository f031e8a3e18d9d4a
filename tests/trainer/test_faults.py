"""Faults of machine, disk and numbers: nothing bad is kept as good, and what is good survives."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer_samples import lora, make_config, make_data, make_model, make_tokenizer, make_trainer
from transformers import TrainerCallback

from mopo_kernels import cli
from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair
from mopo_kernels.trainer import TrainingInterrupted, checkpoint, last_complete_checkpoint
from mopo_kernels.trainer.checkpoint import (
    LOCK_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    WriteError,
    complete_checkpoint,
    find_damage,
    rotate,
    sole_run,
)
from mopo_kernels.trainer.finite import any_not_finite
from mopo_kernels.trainer.interrupts import Interrupts

CHILD = Path(__file__).parents[1] / "helpers" / "fault_child.py"
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "thresholds": None}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of 4 steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    settings = {**EVERY_STEP, "save_steps": 2, "max_steps": 4, "reference": "model"}
    make_trainer(folder, lora(make_model()), **settings).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    return folder


# ------------------------------------------------------------------------------------------------ poisoned steps


class Spoil(TrainerCallback):
    """Puts a number into weights or gradients at a point of step 3."""

    def __init__(self, when, what, value=math.nan):
        self.when, self.what, self.value = when, what, value

    def __getattribute__(self, name):
        own = object.__getattribute__(self, "__dict__")
        return object.__getattribute__(self, "spoil") if name == own.get("when") else super().__getattribute__(name)

    def spoil(self, args, state, control, model, **kwargs):
        if state.global_step == (3 if self.when in ("on_step_end", "on_log") else 2):
            with torch.no_grad():
                self.what(model)[3] = self.value


def embedding(model):
    # Of a word that no row has: the loss never sees it.
    return model.get_input_embeddings().weight[2]


def gradient(model):
    return model.get_input_embeddings().weight.grad[2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("when", "what", "named"),
    [
        ("on_pre_optimizer_step", gradient, "the gradients of step 3 are not finite"),
        ("on_optimizer_step", embedding, r"the weights \(model\.embed_tokens\.weight\) of step 3 are not finite"),
        ("on_step_end", embedding, r"the weights \(model\.embed_tokens\.weight\) of step 3 are not finite"),
    ],
    ids=["gradient", "optimizer", "callback"],
)
def test_a_poisoned_step_is_not_saved_and_keeps_the_last_good_checkpoint(when, what, named, value, tmp_path):
    trainer = make_trainer(tmp_path, **EVERY_STEP, max_steps=3, save_total_limit=1, max_grad_norm=0.0)
    spoil = Spoil(when, what, value)
    # Before the trainer's own callback, as the order decides who sees it first; what comes later is caught on saving.
    (trainer.callback_handler.callbacks.append if when == "on_step_end" else _first(trainer))(spoil)
    with pytest.raises(FloatingPointError, match=rf"^{named}: .*the last good checkpoint is {tmp_path}/checkpoint-2$"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").values())
    with pytest.raises(FloatingPointError, match=r"^the weights "):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def _first(trainer):
    return lambda callback: trainer.callback_handler.callbacks.insert(0, callback)


def rows(words):
    """A prompt a word, each with an id; the responses go on with it."""
    pair = (PreferencePair(1, 0, {"helpful": 1.0, "brief": 0.0}),)
    return PreferenceData.from_examples(
        [PreferenceExample(word, (" w1", " w2 w3"), pair, id=f"id {word}") for word in words], ["helpful", "brief"]
    )


def test_a_loss_that_is_not_finite_names_the_rows_it_came_from_and_no_others(tmp_path):
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "thresholds": None}
    trainer = make_trainer(tmp_path, data=rows(["w10", "w11", "w12", "w13"]), max_steps=1, **settings)
    trainer._prepare_references()
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[3 + 12] = math.nan
    with pytest.raises(FloatingPointError, match=r"^the loss .* of step 1 .*; its examples: id w12; nothing of it was"):
        trainer.train()


def test_a_gradient_that_is_not_finite_names_every_row_of_the_step_in_one_line(tmp_path):
    settings = {"per_device_train_batch_size": 3, "max_steps": 3, "train_sampling_strategy": "sequential"}
    names = [f"w{i}" for i in range(9)]
    data = PreferenceData(
        rows(names).dataset.map(lambda row: {"id": "\x1b[31m" + row["prompt"] + "\n"}), ("helpful", "brief")
    )
    trainer = make_trainer(tmp_path, data=data, thresholds=None, **settings)
    _first(trainer)(Spoil("on_pre_optimizer_step", gradient))
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    assert "of step 3 are" in str(caught.value)
    assert r"its examples: \x1b[31mw6\n, \x1b[31mw7\n, \x1b[31mw8\n; nothing" in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith("the last good checkpoint is none")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_that_is_not_finite_is_found_in_any_dtype(value, dtype):
    tensors = [torch.full((5,), torch.finfo(dtype).max, dtype=dtype), torch.zeros(3, 4, dtype=dtype), torch.zeros(0)]
    assert not any_not_finite(tensors)
    tensors[1][2, 3] = value
    assert any_not_finite(tensors)


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "^seed: expected 42, with which .*checkpoint-4 was trained; got 1 "),
        ({"data_seed": 7}, "^data_seed: expected 42, with which"),
        ({"gradient_accumulation_steps": 2}, "^gradient_accumulation_steps: expected 1, with which .* got 2 "),
        ({"per_device_train_batch_size": 1}, "^per_device_train_batch_size: expected 2, with which .* got 1 "),
        ({"max_tokens_per_batch": 50}, "^max_tokens_per_batch: expected None, with which .* got 50 "),
        ({"data": make_data(8, seed=3)}, r"^train_data: expected '8 prompts \(\w+\)', with which"),
        ({"max_response_length": 60}, "^max_response_length: expected None, with which"),
        ({"optim": "sgd"}, "^optim: expected 'adamw_torch.*', with which .* got 'sgd'"),
        ({"alpha": 9}, "^adapter lora_alpha: expected 5, with which .* got 9"),
    ],
)
def test_other_rows_another_adapter_or_another_optimizer_are_refused_on_resume(changes, message, run):
    settings = {**EVERY_STEP, "max_steps": 6, "reference": "model", **changes}
    model, data = lora(make_model(), lora_alpha=settings.pop("alpha", 5)), settings.pop("data", None)
    trainer = make_trainer(run, model, data, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_the_same_prompts_a_step_may_be_laid_out_otherwise_which_is_named(run, caplog):
    settings = {**EVERY_STEP, "max_steps": 6, "reference": "model"}
    ends = []
    for layout in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}):
        trainer = make_trainer(run, lora(make_model()), **settings, **layout)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        ends.append(trainer.model.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)
    for told in ("per_device_train_batch_size 1 (was 2)", "gradient_accumulation_steps 2 (was 1)"):
        assert f"resuming from {run / 'checkpoint-4'} with {told}" in caplog.messages


def test_labels_are_part_of_the_data_a_run_goes_on_with(run):
    flipped = [
        PreferenceExample(e.prompt, e.responses, tuple(PreferencePair(p.j, p.i, p.preference) for p in e.pairs))
        for e in make_data(8)
    ]
    data = PreferenceData.from_examples(flipped, ["helpful", "brief"])
    trainer = make_trainer(run, lora(make_model()), data, **EVERY_STEP, max_steps=6, reference="model")
    with pytest.raises(ValueError, match=r"^train_data: "):
        trainer.train(resume_from_checkpoint=True)


def test_other_rows_are_taken_and_named_where_an_epoch_is_begun_anew(run, caplog):
    settings = {**EVERY_STEP, "max_steps": 5, "reference": "model", "ignore_data_skip": True}
    trainer = make_trainer(run, lora(make_model()), make_data(8, seed=3), seed=1, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    told = [line for line in caplog.messages if line.startswith(f"resuming from {run / 'checkpoint-4'} with ")]
    assert sorted(line.split(" with ")[1].split()[0] for line in told) == [
        "data_seed",
        "max_steps",
        "seed",
        "train_data",
    ]


def test_what_else_takes_effect_on_a_run_that_goes_on_is_named(run, caplog):
    settings = {**EVERY_STEP, "max_steps": 4, "reference": "model"}
    changes = {"max_steps": (5, 4), "lr_scheduler_type": ("cosine", "linear"), "warmup_steps": (2, 0)}
    changes |= {
        "max_grad_norm": (0.5, 1.0),
        "disable_dropout": (False, True),
        "dual_max": (3.0, 10.0),
        "bf16": (True, False),
    }
    trainer = make_trainer(run, lora(make_model()), **settings | {name: value for name, (value, _) in changes.items()})
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    at = run / "checkpoint-2"
    told = {line.removeprefix(f"resuming from {at} with ") for line in caplog.messages if line.startswith("resuming")}
    assert told == {f"{name} {value} (was {before})" for name, (value, before) in changes.items()}


def test_a_changed_learning_rate_takes_effect_on_resume_and_is_named(run, caplog):
    settings = {**EVERY_STEP, "max_steps": 8, "reference": "model", "lr_scheduler_type": "linear"}
    at = run / "checkpoint-2"
    still = make_trainer(run / "still", lora(make_model()), **{**settings, "learning_rate": 0.0, "max_steps": 3})
    still.train(resume_from_checkpoint=str(at))
    before, after = load_file(at / "adapter_model.safetensors"), still.model.state_dict()
    assert all(torch.equal(value, after[name.replace(".weight", ".default.weight")]) for name, value in before.items())
    assert f"resuming from {at} with learning_rate 0.0 (was 0.01)" in caplog.messages
    faster = make_trainer(run / "faster", lora(make_model()), **settings, learning_rate=0.03, weight_decay=0.1)
    faster.train(resume_from_checkpoint=str(at))
    rates = [line["learning_rate"] for line in faster.state.log_history if "learning_rate" in line]
    # The first step takes the schedule of before, 4 steps long, on the rate of today.
    assert rates[2:] == pytest.approx([0.03 * share for share in (1 / 2, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])
    assert faster.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert any("learning_rate 0.03 (was 0.01)" in line and "weight_decay 0.1" in line for line in caplog.messages)


def test_going_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(run, caplog):
    settings = {**EVERY_STEP, "reference": "model"}
    make_trainer(run, lora(make_model()), **settings, max_steps=3).train(
        resume_from_checkpoint=str(run / "checkpoint-2")
    )
    assert f"going on from {run / 'checkpoint-2'}: checkpoint-4 no longer counts" in caplog.messages
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")


# ---------------------------------------------------------------------------------------------------- flipped bits


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0.0, 0.37, 0.99])
def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_found(where, run):
    newest = run / "checkpoint-4"
    names = json.loads((newest / MANIFEST_FILE).read_text())["files"]
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", STATE_FILE} <= set(
        names
    )
    for name in names:
        content = (newest / name).read_bytes()
        flip(newest / name, where)
        assert find_damage(newest) == f"{name} was changed after it was written (its SHA-256 is another)"
        (newest / name).write_bytes(content)
    assert find_damage(newest) is None


def test_a_changed_adapter_is_passed_over_by_name_and_refused_when_asked_for(run, caplog):
    newest = run / "checkpoint-4"
    flip(newest / "adapter_model.safetensors", 0.9)
    settings = {**EVERY_STEP, "max_steps": 5, "reference": "model"}
    with pytest.raises(ValueError, match=r"got .*checkpoint-4: adapter_model\.safetensors was changed after"):
        make_trainer(run, lora(make_model()), **settings).train(resume_from_checkpoint=str(newest))
    trainer = make_trainer(run, lora(make_model()), **settings)
    trainer.train(resume_from_checkpoint=True)
    assert f"{newest} is passed over: adapter_model.safetensors was changed after" in caplog.text
    assert trainer.state.global_step == 5
    assert find_damage(run / "checkpoint-5") is None


def test_a_file_that_came_later_is_no_part_of_a_checkpoint_but_for_its_card(run):
    newest = run / "checkpoint-4"
    (newest / "README.md").write_text("certified")
    assert find_damage(newest) is None
    (newest / "model.safetensors").write_bytes(b"")
    assert find_damage(newest) == "model.safetensors was not written with it"


@pytest.mark.parametrize("bit", range(0, 400, 37))
def test_one_flipped_bit_in_a_reference_file_is_never_used(bit, tmp_path):
    def prepared(**changes):
        trainer = make_trainer(tmp_path / "run", reference="precomputed", thresholds=None, **changes)
        trainer._prepare_references()
        return trainer.train_dataset.dataset["ref_logprob"]

    file = tmp_path / "mine.logprob"
    whole = prepared(reference_path=str(file))
    content = bytearray(file.read_bytes())
    first = content.index(b"\n") + 1
    content[first + bit // 8 % (len(content) - first)] ^= 1 << bit % 8
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^reference_path: expected this run's .* got those of \d of 8 examples"):
        prepared(reference_path=str(file))
    # What an interrupted pass left is used as far as it is sound.
    file.rename(tmp_path / ".mine.logprob.partial")
    assert list(prepared(reference_path=str(file))) == list(whole)


def test_a_checkpoint_runs_no_code(run):
    """Even one whose manifest is right: whoever can write a folder can write that as well."""
    newest = run / "checkpoint-4"
    ran = run / "ran"

    class Code:
        def __reduce__(self):
            return Path.touch, (ran,)

    for name in (STATE_FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (newest / name).read_bytes()
        torch.save({"code": Code()}, newest / name)
        complete_checkpoint(newest, json.loads((newest / MANIFEST_FILE).read_text())["run"])
        assert find_damage(newest) is None
        trainer = make_trainer(run, lora(make_model()), **EVERY_STEP, max_steps=6, reference="model")
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected tensors and plain values in .*-4, as"):
            trainer.train(resume_from_checkpoint=str(newest))
        assert not ran.exists()
        (newest / name).write_bytes(content)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(newest / "training_args.bin", weights_only=True)  # written for the user, and never read


# ------------------------------------------------------------------------------------------------- two runs at once


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_under_way(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    make_trainer(tmp_path, **EVERY_STEP, max_steps=1).train()
    # As another process has it: the lock belongs to the open file.
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        told = rf"^output_dir: expected a folder in which no other run .* got {tmp_path}.*\(process {os.getpid()}\)$"
        for resume in (None, True):
            with pytest.raises(ValueError, match=told):
                make_trainer(tmp_path, **EVERY_STEP).train(resume_from_checkpoint=resume)
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    make_trainer(tmp_path, **EVERY_STEP).train(resume_from_checkpoint=True)


def test_a_run_that_failed_gives_its_folder_back_and_a_lock_may_be_nested(tmp_path):
    with pytest.raises(RuntimeError, match="inside"), sole_run(tmp_path), sole_run(tmp_path):
        raise RuntimeError("inside")
    with sole_run(tmp_path):
        pass
    with sole_run(tmp_path / "empty"):
        assert (tmp_path / "empty").is_dir()
    assert not (tmp_path / "empty").exists()


def test_where_there_are_no_locks_a_run_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
    def unsupported(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(checkpoint.FileLock, "acquire", unsupported)
    with sole_run(tmp_path):
        assert "nothing keeps a second run out" in caplog.text


# ------------------------------------------------------------------------------------------------------- rotation


def stored(folder: Path, step: int, run: str | None, age: float, manifest: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / STATE_FILE).write_bytes(b"state")
    if manifest:
        complete_checkpoint(path, run)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_rotation_goes_by_step_whatever_the_clock_says(tmp_path):
    # A copied folder, or a clock that was set back: the oldest step is the youngest file.
    paths = {step: stored(tmp_path, step, "mine", age=100.0 * step) for step in (9, 10, 11, 100)}
    rotate(tmp_path, 2, paths[100], None)
    assert checkpoints(tmp_path) == ["checkpoint-100", "checkpoint-11"]


def test_rotation_takes_what_is_unfinished_or_of_another_run_first_and_keeps_newest_and_best(tmp_path):
    for step, run, manifest in ((1, "mine", True), (2, "mine", True), (3, "mine", True), (50, "other", True)):
        stored(tmp_path, step, run, age=0, manifest=manifest)
    stored(tmp_path, 60, None, age=0, manifest=False)
    rotate(tmp_path, 3, tmp_path / "checkpoint-3", str(tmp_path / "checkpoint-1"))
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    rotate(tmp_path, 1, tmp_path / "checkpoint-3", str(tmp_path / "checkpoint-1"))
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    rotate(tmp_path, None, tmp_path / "checkpoint-3", None)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-3"]


# --------------------------------------------------------------------------------------------------------- signals


class Send(TrainerCallback):
    """In the middle of step 2, several times, as a launcher and a batch system may both send it."""

    def __init__(self, number):
        self.number = number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            for _ in range(3):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_end_finishes_the_step_and_writes_a_checkpoint(name, tmp_path):
    number = getattr(signal, name)
    trainer = make_trainer(tmp_path, **EVERY_STEP, max_steps=4)
    trainer.add_callback(Send(number))
    before = signal.getsignal(number)
    with pytest.raises(
        TrainingInterrupted, match=rf"^training interrupted by {name}; resume with .*checkpoint-2$"
    ) as e:
        trainer.train()
    assert e.value.signal == number
    assert signal.getsignal(number) is before
    assert find_damage(tmp_path / "checkpoint-2") is None


def test_a_signal_that_the_program_ignores_or_handles_is_left_to_it(tmp_path):
    seen = []
    hup = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    term = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer = make_trainer(tmp_path, thresholds=None, max_steps=3)
        trainer.add_callback(Send(signal.SIGHUP))
        trainer.add_callback(Send(signal.SIGTERM))
        trainer.train()
    finally:
        signal.signal(signal.SIGHUP, hup)
        signal.signal(signal.SIGTERM, term)
    assert (trainer.state.global_step, len(seen)) == (3, 3)


def test_output_to_a_terminal_that_closed_does_not_end_the_run():
    master, slave = os.openpty()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(slave, 1)
            os.dup2(slave, 2)
            with Interrupts().deferred():
                os.close(slave)
                os.close(master)
                os.kill(os.getpid(), signal.SIGHUP)
                os.write(1, b"a log line\n")
                os.write(2, b"a progress bar\n")
            code = 0
        finally:
            os._exit(code)
    os.close(slave)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ------------------------------------------------------------------------------------------------------- full disk


def at_most(trainer, size):
    """From step 3 on no file of the trainer can have more bytes, as on a disk that is full."""
    write = trainer._write_checkpoint

    def limited(folder, *args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.global_step >= 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            write(folder, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer._write_checkpoint = limited


@pytest.mark.parametrize("size", [0, 500, 6000, 12000])
def test_a_full_disk_ends_in_one_line_that_says_what_survived(size, tmp_path):
    settings = {**EVERY_STEP, "max_steps": 4, "reference": "model"}
    trainer = make_trainer(tmp_path, lora(make_model()), **settings, save_total_limit=1)
    at_most(trainer, size)
    with pytest.raises(WriteError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"checkpoint {tmp_path / 'checkpoint-3'} could not be written: ")
    assert message.endswith(f"training stopped at step 3, the last complete checkpoint is {tmp_path / 'checkpoint-2'}")
    assert message.isprintable()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    resumed = make_trainer(tmp_path, lora(make_model()), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_full_disk_elsewhere_in_training_says_what_survived_and_other_errors_are_left_alone(tmp_path):
    class Log(TrainerCallback):
        def __init__(self, number):
            self.number = number

        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise OSError(self.number, os.strerror(self.number))

    for number, error, told in (
        (errno.ENOSPC, WriteError, r"^a file of the run could not be written: .*No space left .* checkpoint-2$"),
        (errno.ENOENT, FileNotFoundError, "No such file"),
    ):
        trainer = make_trainer(tmp_path, **EVERY_STEP, max_steps=4)
        trainer.add_callback(Log(number))
        with pytest.raises(error, match=told.replace(" checkpoint-2", f" {tmp_path}/checkpoint-2")):
            trainer.train()


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_data(8).save(folder / "train.jsonl")
    settings = vars(make_config(folder)) | EVERY_STEP
    names = ("tau", "primary", "learning_rate", "per_device_train_batch_size", "use_cpu", "disable_tqdm")
    options = {name: settings[name] for name in (*names, "logging_steps", "save_strategy", "save_steps")}
    options["save_strategy"] = "steps"
    options |= {"model_name_or_path": folder / "model", "train_file": folder / "train.jsonl", "report_to": "none"}
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["train", *argv, "--lora_r", "2", "--max_steps", "3"]


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_ends_by_signal_disk_and_divergence_with_one_line_and_its_code(
    command, tmp_path, monkeypatch, capsys
):
    from mopo_kernels.trainer import MOPOTrainer

    def outcome(folder, method, action):
        real = getattr(MOPOTrainer, method)

        def acting(self, *args, **kwargs):
            if self.state.global_step == 2:
                action(self)
            return real(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(MOPOTrainer, method, acting)
            with pytest.raises(SystemExit) as caught:
                cli.main([*command, "--output_dir", str(tmp_path / folder)])
        return caught.value.code, last_line(capsys)

    def full(trainer):
        raise OSError(errno.ENOSPC, "No space left on device")

    @torch.no_grad()
    def poison(trainer):
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(math.nan)

    code, line = outcome("term", "_begin_step", lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    assert (code, line) == (
        143,
        f"mopo: training interrupted by SIGTERM; resume with {tmp_path / 'term' / 'checkpoint-3'}",
    )
    code, line = outcome("full", "_state", full)
    assert code == 1
    assert line.startswith(
        f"mopo: error: checkpoint {tmp_path / 'full' / 'checkpoint-2'} could not be written: [Errno 28]"
    )
    assert line.endswith(f"the last complete checkpoint is {tmp_path / 'full' / 'checkpoint-1'}")
    code, line = outcome("poison", "_begin_step", poison)
    assert code == 1
    assert line.startswith("mopo: error: the loss or the log-probabilities of step 3 are not finite: ")
    assert line.endswith(f"the last good checkpoint is {tmp_path / 'poison' / 'checkpoint-2'}")


def test_the_command_holds_its_folder_from_loading_to_the_last_file(command, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    tmp_path.joinpath(LOCK_FILE).touch()
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert cli.main([*command, "--output_dir", str(tmp_path)]) == 2
    assert last_line(capsys).startswith("mopo: error: output_dir: expected a folder in which no other run is under way")


# ------------------------------------------------------------------------------------- killed, in processes of its own


def child(*arguments: str) -> dict:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(CHILD), *arguments], env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check_killed(outcome: dict) -> None:
    assert outcome["wrong"] == []
    assert outcome["killed"] >= 0.9 * outcome["trials"] > 0
    assert outcome["two at once"] == ["refused", "trained"]


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights_and_two_at_once_exclude_each_other(tmp_path):
    check_killed(child(str(tmp_path), "4"))


@pytest.mark.slow
def test_a_run_killed_at_each_of_its_moments_resumes_to_the_same_weights(tmp_path):
    """A moment a file operation, of which a run has fewer than a thousand."""
    check_killed(child(str(tmp_path), "1000"))
