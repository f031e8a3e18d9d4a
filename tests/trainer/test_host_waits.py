"""A training step launches its work and goes on: before the backbone, between it and the loss, and after, the host does
not wait for the GPU. Run on tensors without values (fake_cuda.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import DEVICE, HostWait, fake_cuda, run_as_on_a_gpu
from trainer_samples import lora, make_data, make_model, make_trainer

from mopo_kernels.trainer import MOPOConfig, MOPOTrainer
from mopo_kernels.trainer import forward as forward_module
from mopo_kernels.transfer import to_device

# Before the first layer runs transformers asks whether a padded batch has padding.
MASKS = "transformers/masking_utils.py"
LAYOUTS = {"shared": "always", "rows": "never"}
SETTINGS: dict[str, dict[str, Any]] = {
    "regression": {},
    "cloning": {"loss_type": "cloning", "max_ratio": 2.0, "estimator": "closed_form"},
    "sigmoid, per token": {"loss_type": "sigmoid", "length_normalize": True, "estimator": "snis"},
    "label rates": {"label_rate": {"brief": 0.5}},
    "reference of the past": {"reference_update_steps": 5},
}


def trainer_on_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool = True, **settings: Any
) -> MOPOTrainer:
    """A trainer whose model is on the device, where it runs as on a GPU."""
    run_as_on_a_gpu(monkeypatch)
    model = lora(make_model("llama")) if adapters else make_model("llama")
    trainer = make_trainer(folder, model, reference="model", **settings)
    if trainer.args.reference_update_steps:
        trainer.reference.update(trainer.model)
    for values in (trainer.reference.initial, trainer.reference.snapshot):
        if values is not None:
            values.update({name: value.to("meta") for name, value in values.items()})
    trainer.model.to_empty(device="meta")
    monkeypatch.setattr(MOPOConfig, "device", property(lambda self: DEVICE))
    with fake_cuda():
        trainer._reset_sums()
        trainer._eval_sums = torch.zeros_like(trainer._step_sums)
    return trainer


def batch_of(trainer: MOPOTrainer) -> dict[str, Any]:
    """One as the loader gives it, with a response of which nothing is scored."""
    batch = dict(next(iter(trainer.get_train_dataloader())))
    if "cu_seqlens" in batch:
        batch["target"][: int(batch["cu_seqlens"][1])] = -100
    else:
        batch["labels"][0] = -100
    return batch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "all parameters"])
def test_a_step_does_not_wait(
    adapters: bool, layout: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on_device(tmp_path, monkeypatch, adapters, shared_prompts=LAYOUTS[layout], **SETTINGS[name])
    batch = batch_of(trainer)
    with fake_cuda(MASKS):
        items = trainer._get_num_items_in_batch([batch, batch], DEVICE)
        loss = trainer.training_step(trainer.model, batch, items)
        assert loss.device == trainer._step_sums.device == DEVICE
        trainer.prediction_step(trainer.model, batch, True)
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_is_on_the_device_is_read_before_the_backbone_runs(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the negative control: what the host keeps of a batch is what spares it the wait."""
    trainer = trainer_on_device(tmp_path, monkeypatch, shared_prompts=LAYOUTS[layout])
    ran: list[Any] = []
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: ran.append(1))
    batch = {name: value.to("meta") for name, value in batch_of(trainer).items()}
    with fake_cuda(MASKS), pytest.raises(HostWait, match="copies from the device"):
        trainer.model(**batch, **trainer._policy_arguments(1.0))
    assert not ran


def test_negative_control_counting_a_mask_of_responses_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on_device(tmp_path, monkeypatch)
    batch = batch_of(trainer)
    monkeypatch.setattr(forward_module, "_present", lambda scored, device: to_device(scored.lengths, device) > 0)
    with fake_cuda(MASKS), pytest.raises(HostWait, match="counts a mask"):
        trainer.training_step(trainer.model, batch, None)


def test_loaders_leave_batches_on_the_host(tmp_path: Path) -> None:
    """accelerate moves them to its loader's ``device`` where it has one."""
    trainer = make_trainer(tmp_path, eval_dataset=make_data(4, seed=1))
    loaders = (
        trainer.get_train_dataloader(),
        trainer.get_eval_dataloader(),
        trainer.get_test_dataloader(trainer.eval_dataset),
    )
    for loader in loaders:
        assert hasattr(loader, "device")
        assert loader.device is None
