"""A killed and resumed run ends bitwise where one that never stopped ends; half a checkpoint is no checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from trainer_child import build
from trainer_samples import lora, make_model, make_trainer
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mopo_kernels.trainer import TrainingInterrupted, last_complete_checkpoint
from mopo_kernels.trainer.checkpoint import MANIFEST_FILE, STATE_FILE, is_complete

CHILD = Path(__file__).with_name("trainer_child.py")


@pytest.fixture(autouse=True)
def one_thread():
    """The same number of threads as in the killed process: the order of sums is part of a bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two runs, each killed with SIGKILL: between two checkpoints, and while one was being written."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("lora", "full")}
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    children = [
        subprocess.Popen(
            [sys.executable, str(CHILD), kind, str(folders[kind]), how],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for kind, how in (("lora", "kill-at-step-5"), ("full", "kill-while-saving-6"))
    ]
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == -signal.SIGKILL, output.decode()
    return folders


def same(first, second, path=""):
    """Bitwise equality of nested containers of tensors and numbers."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            same(a, b, f"{path}/{index}")
    else:
        assert first == second, path


TIMED = ("train_runtime", "per_second", "peak_memory", "total_flos", "train_loss")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_killed_and_resumed_equals_never_stopped_bit_for_bit(kind, killed, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(killed[kind], folder)
    whole = build(kind, tmp_path / "whole")
    whole.train()
    resumed = build(kind, folder)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-3")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 10

    same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()), "weights")
    same(whole.optimizer.state_dict(), resumed.optimizer.state_dict(), "optimizer")
    same(whole.lr_scheduler.state_dict(), resumed.lr_scheduler.state_dict(), "scheduler")
    same(whole.dual.state_dict(), resumed.dual.state_dict(), "dual")
    assert whole.dual.multiplier["brief"] > 0
    assert whole.dual.threshold["brief"] != 0.55
    same(whole.reference.snapshot, resumed.reference.snapshot, "reference")
    # The log line of step 5 covers steps 1 to 5, of which the killed run did the first three.
    for expected, found in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        for key, value in expected.items():
            if key != "loss" and not any(word in key for word in TIMED):
                assert found[key] == value, (expected["step"], key)


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(killed):
    folder = killed["full"]
    assert get_last_checkpoint(str(folder)) == str(folder / "checkpoint-6"), "the Trainer itself would take it"
    assert (folder / "checkpoint-6" / "optimizer.pt").is_file()
    # save_total_limit=1: the older one may go only once the newer one counts.
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-3")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected a complete checkpoint .*checkpoint-6"):
        build("full", folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(folder, lora(make_model()), max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "a file missing", "a file cut short", "no state"])
def test_a_damaged_checkpoint_is_passed_over(damage, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    newest = folder / "checkpoint-4"
    assert last_complete_checkpoint(folder) == str(newest)
    manifest = newest / MANIFEST_FILE
    weights = newest / "adapter_model.safetensors"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "a file missing":
        (newest / "optimizer.pt").unlink()
    elif damage == "a file cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (newest / STATE_FILE).unlink()
    assert not is_complete(newest)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")


def test_checkpoints_are_ordered_by_step_and_need_not_exist(saved, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (9, 10):
        shutil.copytree(saved / "checkpoint-4", folder / f"checkpoint-{step}")
    shutil.copytree(saved / "checkpoint-4", folder / "checkpoint-best")
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-10")
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_resuming_where_nothing_is_complete_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected a complete checkpoint in output_dir"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resuming_with_another_base_model_is_refused(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    trainer = make_trainer(folder, lora(make_model(seed=1)), max_steps=6, reference="model")
    with pytest.raises(ValueError, match=r"expected the model that .* started from"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_with_other_objectives_is_refused(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    trainer = make_trainer(folder, lora(make_model()), max_steps=6, primary="brief", thresholds=None, reference="model")
    with pytest.raises(ValueError, match="primary"):
        trainer.train(resume_from_checkpoint=True)


def test_a_second_train_starts_its_multipliers_afresh(tmp_path):
    trainer = make_trainer(tmp_path, thresholds={"brief": 0.55}, initial_multiplier="zero", max_steps=3)
    trainer.train()
    first = trainer.dual.steps
    trainer.train()
    assert first == trainer.dual.steps == 3


def test_checkpoints_without_optimizer_do_not_count(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1, save_only_model=True)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()
    assert last_complete_checkpoint(tmp_path) is None


def test_old_checkpoints_go_once_the_new_one_counts(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert trainer.args.save_total_limit == 2


class InterruptAtStep(TrainerCallback):
    """What Ctrl-C does, in the middle of step 3."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint_to_resume_from(tmp_path):
    settings = {"max_steps": 6, "thresholds": {"brief": 0.55}, "initial_multiplier": "zero"}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **settings)
    stopped.add_callback(InterruptAtStep())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"training interrupted; resume with .*checkpoint-3"):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = make_trainer(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()), "weights")
    same(whole.dual.state_dict(), resumed.dual.state_dict(), "dual")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5)

    class Twice(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    trainer.add_callback(Twice())
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingInterrupted)
    assert trainer.state.global_step == 0


def test_training_runs_in_a_thread_that_cannot_handle_signals(tmp_path):
    trainer = make_trainer(tmp_path)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2
