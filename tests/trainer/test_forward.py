"""The loss inside the model's forward has the gradients of plain logits, for every head, or refuses the head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from trainer_samples import CONFIGS, batch_of, fresh, gradients, lora, make_model, make_trainer

from mopo_kernels import naive
from mopo_kernels.arguments import LogitTransform
from mopo_kernels.trainer.batch_layout import take_layout
from mopo_kernels.trainer.lm_head import find_transform, output_head

DOUBLE = torch.float64


def plain_loss(trainer, model, batch):
    """The loss from the model's own logits, by the oracle."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    token = torch.log_softmax(logits.to(DOUBLE), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logprob = (token * (labels != -100)).sum(1)
    return naive.mopo_loss(
        logprob,
        batch["ref_logprob"].to(DOUBLE),
        batch["pairs"],
        batch["preference"].to(DOUBLE),
        trainer.dual.weight.to(DOUBLE),
        tau=trainer.args.tau,
        pair_weight=batch["pair_weight"].to(DOUBLE),
    ).loss


def freeze_head(model):
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


def head_with_bias(model):
    head = model.get_output_embeddings()
    biased = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
    biased.weight = head.weight
    model.set_output_embeddings(biased)
    return model


def two_adapters_on_head(model):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["other"].weight.normal_(0.0, 0.1)
    return model


MODELS = {
    **{name: lambda name=name: make_model(name, dtype=DOUBLE) for name in CONFIGS},
    "frozen head": lambda: freeze_head(make_model(dtype=DOUBLE)),
    "head with bias": lambda: head_with_bias(make_model(dtype=DOUBLE)),
    "lora": lambda: lora(make_model(dtype=DOUBLE)),
    "lora on all and the head": lambda: lora(make_model(dtype=DOUBLE), target_modules=["q_proj", "up_proj", "lm_head"]),
    "lora on a tied head": lambda: lora(make_model("llama-tied", dtype=DOUBLE), target_modules=["q_proj", "lm_head"]),
    "lora on tied embeddings": lambda: lora(
        make_model("llama-tied", dtype=DOUBLE), target_modules=["q_proj", "embed_tokens"]
    ),
    "rslora on the head": lambda: lora(make_model(dtype=DOUBLE), target_modules=["lm_head"], use_rslora=True),
    "two adapters on the head": lambda: two_adapters_on_head(
        lora(make_model(dtype=DOUBLE), target_modules=["q_proj", "lm_head"])
    ),
    "head in modules_to_save": lambda: lora(make_model(dtype=DOUBLE), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_logits_for_every_trained_parameter(name, tmp_path):
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DOUBLE)
    trainer = make_trainer(tmp_path, model, primary="helpful", initial_multiplier={"brief": 0.7})
    batch = batch_of(trainer)
    plain = plain_loss(trainer, model, batch)
    expected = gradients(model, plain)
    fused = model(**batch, objective_weight=trainer.dual.weight)["loss"]
    found = gradients(model, fused)
    assert float(fused.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    assert expected.keys() == found.keys()
    assert all(value is not None for value in expected.values()), "a parameter without gradient in plain PyTorch"
    # Some gradients are exactly 0 in theory (a key's bias), so rounding is judged by the largest.
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12 * largest, msg=key)


@pytest.mark.parametrize("loss_type", ["regression", "cloning", "sigmoid"])
def test_every_loss_trains_through_the_forward(loss_type, tmp_path):
    trainer = make_trainer(tmp_path, loss_type=loss_type)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_log_probabilities_per_token_are_the_oracles(tmp_path):
    trainer = make_trainer(tmp_path, make_model(dtype=DOUBLE), length_normalize=True, initial_multiplier="zero")
    batch = batch_of(trainer)
    labels = batch["labels"][:, 1:]
    length = (labels != -100).sum(1)
    model = trainer.model
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    token = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = naive.mopo_loss(
        (token * (labels != -100)).sum(1),
        batch["ref_logprob"],
        batch["pairs"],
        batch["preference"].to(DOUBLE),
        trainer.dual.weight.to(DOUBLE),
        tau=0.5,
        pair_weight=batch["pair_weight"].to(DOUBLE),
        length=length,
    ).loss
    found = model(**batch, objective_weight=trainer.dual.weight)["loss"]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_a_bf16_head_under_lora_keeps_small_updates(tmp_path):
    """``weight + scaling * B @ A`` rounded to bf16 would lose an update of a thousandth of the weight."""
    model = lora(make_model(dtype=torch.bfloat16), target_modules=["lm_head"])
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.normal_(0.0, 1e-4)
    trainer = make_trainer(tmp_path, model)
    hidden = torch.randn(5, 16, dtype=torch.bfloat16)
    rows, weight, bias = output_head(model).operands(hidden)
    assert bias is None
    assert rows.dtype == weight.dtype == torch.bfloat16
    exact = hidden.double() @ head.base_layer.weight.double().T
    change = rows.double() @ weight.double().T - exact
    delta = head.lora_B["default"].weight @ head.lora_A["default"].weight * head.scaling["default"]
    expected = hidden.double() @ delta.double().T
    assert (change - expected).norm() < 0.02 * expected.norm()
    rounded = (head.base_layer.weight + delta.to(torch.bfloat16)).double()
    assert (hidden.double() @ rounded.T - exact - expected).norm() > 0.5 * expected.norm()
    assert trainer.model is model


def test_generate_and_plain_calls_are_untouched(tmp_path):
    model = make_model()
    tokens = torch.tensor([[5, 6, 7]])
    before = model(input_ids=tokens).logits
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    make_trainer(tmp_path, model)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), generated)


def test_a_deep_copy_has_a_forward_of_its_own(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = batch_of(trainer)
    twin = copy.deepcopy(trainer.model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        twin(**batch, objective_weight=trainer.dual.weight)
        tokens = torch.tensor([[5, 6, 7]])
        assert twin(input_ids=tokens).logits.abs().max() == 0
        assert trainer.model(input_ids=tokens).logits.abs().max() > 0
        losses = [float(m(**batch, objective_weight=trainer.dual.weight)["loss"]) for m in (twin, trainer.model)]
    assert losses[0] != losses[1]


def test_no_tensor_of_tokens_times_vocabulary_is_made(tmp_path):
    """The head's own forward never runs on a preference batch."""
    trainer = make_trainer(tmp_path)
    batch = batch_of(trainer)
    calls = []
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.model(**batch, objective_weight=trainer.dual.weight)["loss"].backward()
    assert not calls
    trainer.model(input_ids=batch["input_ids"])
    assert calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gemma2", (2.0, 1.0)), ("cohere", (None, 0.25)), ("granite", (None, 0.25)), ("llama", (None, 1.0))],
)
def test_caps_and_scales_are_found(name, expected):
    assert find_transform(make_model(name)) == LogitTransform(*expected)


def test_a_head_that_does_more_than_its_configuration_says_is_refused(tmp_path):
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ValueError, match=r"differ from the model's own by \S+ nats"):
        make_trainer(tmp_path, model)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden)


def replaced_head(model):
    model.set_output_embeddings(Doubled(model.get_output_embeddings()))
    return model


def extra_trained(model):
    next(p for name, p in model.named_parameters() if name.endswith("norm.weight")).requires_grad_(True)
    return model


REFUSED = {
    "a head of another type": (lambda: replaced_head(make_model()), r"nn.Linear.*got .*Doubled"),
    "dora on the head": (lambda: lora(make_model(), target_modules=["lm_head"], use_dora=True), r"plain LoRA.*Dora"),
    "dropout on the head": (
        lambda: lora(make_model(), target_modules=["lm_head"], lora_dropout=0.1),
        r"lora_dropout 0 on the output head; got 0\.1",
    ),
    "a bias of LoRA's on the head": (
        lambda: lora(make_model(), target_modules=["lm_head"], lora_bias=True),
        r"lora_bias=False",
    ),
    "biases trained beside LoRA": (lambda: lora(make_model(), bias="all"), r"bias='none'; got bias='all'"),
    "nothing to train": (
        lambda: lora(make_model()).requires_grad_(False),
        "expected parameters to train; all are frozen",
    ),
    "pissa": (lambda: lora(make_model(), init_lora_weights="pissa"), r"got 'pissa', which changes the base weights"),
    "a base weight trained beside LoRA": (
        lambda: extra_trained(lora(make_model())),
        r"belong to an adapter.*got '.*norm\.weight'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_silently_wrong_is_refused_by_name(case, tmp_path):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, build())


def test_prompt_learning_is_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=r"got .*PROMPT_TUNING.*virtual tokens"):
        make_trainer(tmp_path, model)


def test_adapters_injected_without_peft_model_are_refused(tmp_path):
    """By what `model.add_adapter` itself calls: releases of transformers run ahead of peft's and refuse the method."""
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), make_model())
    with pytest.raises(ValueError, match="get_peft_model"):
        make_trainer(tmp_path, model)


def test_the_reference_pass_has_no_dropout_and_leaves_every_mode_and_flag_as_it_was(tmp_path):
    model = fresh(lora(make_model(), lora_dropout=0.5))
    trainer = make_trainer(tmp_path, model, reference="model", reference_update_steps=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    batch = batch_of(trainer)
    del batch["ref_logprob"]
    model.train()
    model.get_base_model().model.layers[1].self_attn.attention_dropout = 0.5
    model.get_base_model().model.layers[0].eval()
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    policy = model._mopo_policy
    trainer.reference.update(model)
    arguments = (model, take_layout(dict(batch)), None)
    torch.manual_seed(0)
    first, lagged = policy.reference_logprob(*arguments)
    torch.manual_seed(1)
    again, lagged_again = policy.reference_logprob(*arguments)
    assert torch.equal(first, again)
    assert torch.equal(lagged, lagged_again)
    assert not torch.equal(first, lagged)
    noisy = [policy.sequence_logprob(*arguments[:-1]) for _ in range(2)]
    assert not torch.equal(*noisy), "the policy's own pass should have dropout here"
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    with model.disable_adapter(), torch.no_grad():
        model.eval()
        base = policy.sequence_logprob(*arguments[:-1])
    torch.testing.assert_close(first, base)


@pytest.mark.parametrize("start", [fresh, lambda model: model], ids=["fresh", "trained before"])
def test_dropout_is_switched_off_outside_fresh_adapters_unless_asked(start, tmp_path):
    for disable in (True, False):
        model = lora(make_model("gpt2"), target_modules=["c_attn"], lora_dropout=0.25, fan_in_fan_out=True)
        make_trainer(tmp_path, start(model), disable_dropout=disable)
        rates = {
            "lora_dropout" in name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)
        }
        assert rates == {True: 0.25 if start is fresh or not disable else 0.0, False: 0.0 if disable else 0.1}


def test_gradients_survive_activation_checkpointing(tmp_path):
    grads = []
    for checkpointing in (False, True):
        model = lora(make_model(dtype=DOUBLE))
        trainer = make_trainer(tmp_path, model)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        batch = batch_of(trainer)
        grads.append(gradients(model, model(**batch, objective_weight=trainer.dual.weight)["loss"]))
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, msg=name)
