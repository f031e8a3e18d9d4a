"""A killed and resumed run ends bitwise where one that never stopped ends; half a checkpoint is no checkpoint."""

from __future__ import annotations

import json
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
from trainer_samples import STEERED, lora, make_dual_data, make_model, make_trainer, same
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mopo_kernels.trainer import TrainingInterrupted, last_complete_checkpoint
from mopo_kernels.trainer.checkpoint import MANIFEST_FILE, RUN_FILE, STATE_FILE, find_damage

CHILD = Path(__file__).parents[1] / "helpers" / "trainer_child.py"


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
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("lora", "full", "judged")}
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    children = [
        subprocess.Popen(
            [sys.executable, str(CHILD), kind, str(folders[kind]), how],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for kind, how in (("lora", "kill-at-step-5"), ("full", "kill-while-saving-6"), ("judged", "kill-at-step-5"))
    ]
    for child in children:
        output, _ = child.communicate(timeout=240)
        assert child.returncode == -signal.SIGKILL, output.decode()
    return folders


TIMED = ("train_runtime", "per_second", "peak_memory", "total_flos", "train_loss")


@pytest.mark.parametrize("kind", ["lora", "full", "judged"])
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
    same(whole._controller.state_dict(), resumed._controller.state_dict(), "controller")
    same(whole.in_sample, resumed.in_sample, "in-sample")
    assert whole.dual.multiplier["brief"] > 0
    assert whole.dual.threshold["brief"] != 0.8
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
    assert find_damage(newest) is not None
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


# 4 steps an epoch: the Trainer itself would go on from within an epoch.
@pytest.mark.parametrize(
    "length",
    [{"max_steps": 4}, {"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": 3}],
    ids=["whole epochs", "mid epoch", "epochs", "shortened"],
)
def test_a_finished_run_is_resumed_without_a_step(length, tmp_path, caplog):
    settings = {
        "save_strategy": "steps",
        "save_steps": 100,
        "thresholds": {"brief": 0.55},
        "initial_multiplier": "zero",
    }
    settings |= {"on_infeasible": "warn", "estimator": "snis", "dual_dataset": make_dual_data(), **STEERED}
    first = make_trainer(tmp_path, **{**settings, **(length if length["max_steps"] != 3 else {"max_steps": 6})})
    first.train()
    assert not first.already_finished
    steps = first.state.global_step
    for _ in range(2):
        caplog.clear()
        again = make_trainer(tmp_path, **{**settings, **length})
        again.train(resume_from_checkpoint=True)
        assert again.already_finished
        planned = 3 if length["max_steps"] == 3 else steps
        told = f"nothing left to train: {tmp_path / f'checkpoint-{steps}'} has {steps} of {planned} steps"
        assert caplog.messages.count(told) == 1
        assert again.state.global_step == steps
        assert again.dual.steps == first.dual.steps == steps
        same(dict(first.model.state_dict()), dict(again.model.state_dict()), "weights")
        same(first.dual.state_dict(), again.dual.state_dict(), "dual")
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    longer = make_trainer(tmp_path, **settings, max_steps=steps + 1)
    longer.train(resume_from_checkpoint=True)
    assert not longer.already_finished
    assert longer.state.global_step == steps + 1


def test_new_thresholds_are_taken_on_resume_with_one_warning(tmp_path, caplog):
    settings = {"initial_multiplier": "zero", "save_strategy": "steps", "save_steps": 2, "on_infeasible": "warn"}
    make_trainer(tmp_path, thresholds={"brief": 0.5}, max_steps=2, **settings).train()
    for bound, told in ((0.5, False), (0.7, True)):
        caplog.clear()
        resumed = make_trainer(tmp_path, thresholds={"brief": bound}, max_steps=3, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.dual.threshold == {"brief": bound}
        told_line = f"resuming from {tmp_path / 'checkpoint-2'} with other thresholds: brief 0.7 (was 0.5)"
        assert (told_line in caplog.messages) is told


def test_thresholds_that_the_run_itself_moved_are_kept_on_resume(tmp_path, caplog):
    settings = {"thresholds": {"brief": 0.5}, "reference_update_steps": 2, "threshold_relaxation": 0.9}
    settings |= {"initial_multiplier": "zero", "reference": "model", "save_strategy": "steps", "save_steps": 3}
    settings |= {"dual_dataset": make_dual_data(), **STEERED}
    whole = make_trainer(tmp_path, max_steps=3, **settings)
    whole.train()
    assert whole.dual.threshold["brief"] != 0.5
    resumed = make_trainer(tmp_path, max_steps=3, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.dual.threshold == whole.dual.threshold
    assert "other thresholds" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tau": 0.3}, r"^tau: expected 0\.5, with which .*checkpoint-4 was trained; got 0\.3"),
        ({"loss_type": "sigmoid"}, "^loss_type: expected 'regression', with which .* got 'sigmoid'"),
        ({"estimator": "snis"}, "^estimator: expected 'pair', with which .* got 'snis'"),
        ({"reference_update_steps": 2}, "^reference_update_steps: expected None, with which .* got 2"),
        ({"length_normalize": True}, "^length_normalize: expected False, with which .* got True"),
        ({"label_rate": "auto"}, "^label_rate: expected None, with which .* got 'auto'"),
        (
            {"fixed_multipliers": {"brief": 0.2}, "thresholds": None},
            r"^fixed_multipliers: expected \{\}, with which .* got \{'brief': 0\.2\}",
        ),
        ({"primary": "brief", "thresholds": None}, "^primary: expected 'helpful', with which .* got 'brief'"),
        ({"objectives": ["brief", "helpful"]}, r"^objectives: expected \['helpful', 'brief'\], with which"),
        ({"dual_dataset": make_dual_data()}, r"^dual_data: expected 'none', with which .* got '8 prompts \("),
        ({"thresholds": None}, r"^objectives with thresholds: expected \['brief'\], with which .* got \[\]"),
    ],
)
def test_a_checkpoint_of_another_problem_is_refused(changes, message, saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    trainer = make_trainer(folder, lora(make_model()), **{"max_steps": 6, "reference": "model", **changes})
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_goes_on_with_the_fixed_multipliers_it_began_with_only(tmp_path):
    settings = {"thresholds": None, "reference": "model", "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=2, fixed_multipliers={"brief": 0.2}, **settings).train()
    other = make_trainer(tmp_path, max_steps=3, fixed_multipliers={"brief": 0.3}, **settings)
    with pytest.raises(ValueError, match=r"^fixed_multipliers: expected \{'brief': 0\.2\}, .* got \{'brief': 0\.3\}"):
        other.train(resume_from_checkpoint=True)
    same = make_trainer(tmp_path, max_steps=3, fixed_multipliers={"brief": 0.2}, **settings)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 3


def test_a_checkpoint_of_a_version_without_settings_and_identities_is_resumed_from(saved, tmp_path):
    new, folder = tmp_path / "new", tmp_path / "run"
    shutil.copytree(saved, new)
    shutil.copytree(saved, folder)
    (folder / RUN_FILE).unlink()
    newest = folder / "checkpoint-4"
    state = torch.load(newest / STATE_FILE, weights_only=True)
    del state["settings"], state["window_sizes"], state["controller"], state["in_sample"]
    state["window_sums"] = state["window_sums"][8:]  # 4 sums fewer an objective
    torch.save(state, newest / STATE_FILE)
    manifest = json.loads((newest / MANIFEST_FILE).read_text())
    del manifest["run"], manifest["sha256"]
    manifest["files"][STATE_FILE] = (newest / STATE_FILE).stat().st_size
    (newest / MANIFEST_FILE).write_text(json.dumps(manifest))
    ends = []
    for run in (new, folder):
        trainer = make_trainer(run, lora(make_model()), max_steps=6, save_strategy="steps", save_steps=6)
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        ends.append(dict(trainer.model.state_dict()))
    same(*ends)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-6")


def test_a_run_that_starts_afresh_beside_another_resumes_from_its_own_checkpoints(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=6, **settings).train()
    assert "starting afresh beside" not in caplog.text
    second = make_trainer(tmp_path, max_steps=3, **settings, learning_rate=1e-3)
    second.add_callback(InterruptAtStep())
    with pytest.raises(TrainingInterrupted, match=r"resume with .*checkpoint-3$"):
        second.train()
    told = f"starting afresh beside checkpoints of an earlier run, the last of which is {tmp_path / 'checkpoint-6'}: "
    assert caplog.text.count(told) == 1
    third = make_trainer(tmp_path, max_steps=5, **settings, learning_rate=1e-3)
    third.train(resume_from_checkpoint=True)
    assert third.state.global_step == 5
    assert not third.already_finished
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    # A checkpoint asked for by its name brings its run back.
    first = make_trainer(tmp_path, max_steps=7, **settings)
    first.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")


def test_a_run_without_a_checkpoint_yet_has_nothing_of_an_earlier_one_to_resume_from(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    make_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match="expected a complete checkpoint in output_dir"):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_second_train_starts_its_multipliers_afresh(tmp_path):
    settings = {"thresholds": {"brief": 0.55}, "initial_multiplier": "zero", "dual_dataset": make_dual_data()}
    trainer = make_trainer(tmp_path, max_steps=3, **settings, **STEERED)
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
    settings |= {"dual_dataset": make_dual_data(), **STEERED}
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


def test_ctrl_c_in_the_last_step_leaves_a_finished_run(tmp_path):
    stopped = make_trainer(tmp_path, max_steps=3)
    stopped.add_callback(InterruptAtStep())
    with pytest.raises(TrainingInterrupted, match=r"resume with .*checkpoint-3"):
        stopped.train()
    resumed = make_trainer(tmp_path, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.already_finished
    same(dict(stopped.model.state_dict()), dict(resumed.model.state_dict()), "weights")


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
