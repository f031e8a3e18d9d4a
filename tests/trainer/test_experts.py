"""The load-balancing loss of a mixture of experts: the model's own, exact under accumulation, and named where absent.

Data parallelism: kind "experts" of tests/trainer/test_distributed.py.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from trainer_samples import EXPERTS, batch_of, gradients, lora, make_data, make_model, make_trainer, record
from transformers import AutoModelForCausalLM

from mopo_kernels.trainer.experts import load_balancing

DOUBLE = torch.float64


def experts_without(**changes):
    config = copy.deepcopy(EXPERTS)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_it_is_the_models_own_with_its_coefficient(adapter, tmp_path):
    model = make_model("experts", dtype=DOUBLE)
    if adapter:
        model = lora(model).double()
    trainer = make_trainer(tmp_path, model)
    batch = batch_of(trainer)
    weight = {"objective_weight": trainer.objective_weight}
    plain = model(**batch, **weight)["loss"]
    found = model(**batch, **weight, balanced=True)
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    assert float(own) > 0.5
    assert float(found["loss"] - plain) == pytest.approx(0.3 * float(own), rel=1e-6)
    assert trainer._statistics.scalar(found["statistics"], "aux_loss") == pytest.approx(float(own), rel=1e-6)
    expected = gradients(model, plain + 0.3 * own)
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in gradients(model, found["loss"]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("layout", ["never", "always"])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(layout, tmp_path):
    data = make_data(4)
    runs = []
    for batch, steps in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tmp_path / f"{batch}",
            make_model("experts", dtype=DOUBLE),
            data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1e-3,
            thresholds={},
            shared_prompts=layout,
        )
        runs.append((record(trainer).gradients, [line for line in trainer.state.log_history if "loss" in line]))
    (whole, lines), (parts, found) = runs
    for expected, given in zip(whole, parts, strict=True):
        scale = max(float(value.abs().max()) for value in expected.values())
        for name, value in expected.items():
            assert float((given[name] - value).abs().max()) <= 1e-6 * scale, name
    for one, other in zip(lines, found, strict=True):
        assert one["aux_loss"] == pytest.approx(other["aux_loss"], rel=1e-6)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    # A mean of the micro-batches' own would be another.
    batches = [runs[0][1][0]["aux_loss"]]
    model = make_model("experts", dtype=DOUBLE)
    collator = replace(trainer.data_collator, shared_prompts=False)
    for example in data:
        rows = collator([example])
        batches.append(float(model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).aux_loss))
    assert sum(batches[1:]) / 4 != pytest.approx(batches[0], rel=1e-3)


def test_activation_checkpointing_gives_the_same_gradient(tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing),
            make_model("experts"),
            max_steps=1,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        found.append(record(trainer).gradients[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_mixture_that_is_trained_without_says_so_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        assert load_balancing(experts_without(output_router_logits=False), announce=True) is None
        assert load_balancing(make_model(), announce=True) is None
    assert [record.getMessage() for record in caplog.records] == [
        "MixtralForCausalLM is a mixture of 4 experts and is trained without a load-balancing loss "
        "(output_router_logits=true in its configuration adds one)"
    ]


def test_what_asks_for_one_and_cannot_have_it_is_refused():
    dense = make_model()
    dense.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has None, None and 0"):
        load_balancing(dense, announce=False)
    other = experts_without()
    other.num_experts_per_tok = 1
    plain = other.forward
    other.forward = lambda *args, **kwargs: _with_another_loss(plain(*args, **kwargs))
    with pytest.raises(ValueError, match=r"Mixtral\w+'s own load-balancing loss, \S+ on a few tokens; got \S+,"):
        load_balancing(other, announce=False)


def _with_another_loss(output):
    output.aux_loss = output.aux_loss * 2
    return output
