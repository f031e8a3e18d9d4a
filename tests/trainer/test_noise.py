"""Dropout and jitter, wherever a model keeps them: off, or the model is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from trainer_samples import VOCABULARY, fresh, lora, make_trainer
from transformers import AutoConfig, AutoModelForCausalLM

from mopo_kernels.trainer.lm_head import product_step
from mopo_kernels.trainer.noise import NoiseOff, check_noise_off

_HIDDEN = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
_TINY = {**_HIDDEN, "intermediate_size": 24, "max_position_embeddings": 64}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
# What each has: a layer's number, an entry of its configuration that is read in the forward pass, or a router's noise.
NOISY = {
    "opt": {
        **_HIDDEN, "word_embed_proj_dim": 12, "ffn_dim": 24, "max_position_embeddings": 64, "attention_dropout": 0.1,
    },
    "bloom": {**_HIDDEN, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "falcon": {**_HIDDEN, "hidden_dropout": 0.1, "attention_dropout": 0.1, "parallel_attn": False},
    "gpt_bigcode": {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "xglm": {
        "vocab_size": VOCABULARY, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2,
        "max_position_embeddings": 64, "layerdrop": 0.3,
    },
    "biogpt": {**_TINY},
    "persimmon": {**_TINY, "hidden_dropout": 0.1},
    "mixtral": {
        **_TINY, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1,
    },
}  # fmt: skip


def noisy(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **NOISY[name], **_ENDS))


@pytest.mark.parametrize("name", NOISY)
def test_what_a_model_draws_in_training_is_found_and_turned_off(name):
    model = noisy(name)
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=f"expected {type(model).__name__} to compute in training mode"):
        check_noise_off(model)
    off = NoiseOff(model)
    check_noise_off(model)
    with off.as_configured():
        assert model.config.to_dict() == before
    assert model.config.to_dict() != before


@pytest.mark.parametrize("name", ["opt", "falcon"])
def test_at_learning_rate_0_a_model_with_dropout_is_its_reference(name, tmp_path):
    trainer = make_trainer(tmp_path, noisy(name), learning_rate=0.0)
    trainer.train()
    for line in trainer.state.log_history:
        if "kl" in line:
            assert line["kl"] == pytest.approx(0, abs=1e-6)
            assert line["in_sample/satisfaction/helpful"] == pytest.approx(0.5, abs=1e-6)
    trainer.save_model()
    assert json.loads((tmp_path / "config.json").read_text()).get("dropout", 0.1) == 0.1, "saved as it was"


def test_noise_that_no_option_turns_off_is_refused_and_can_be_accepted(tmp_path):
    model = noisy("opt")
    layer = model.model.decoder.layers[1].fc2
    plain = layer.forward
    layer.forward = lambda x: F.dropout(plain(x), 0.2, training=layer.training)
    with pytest.raises(ValueError, match=r"OPTForCausalLM .* draws noise, 0\.\d+ .*disable_dropout=false"):
        make_trainer(tmp_path, model)
    make_trainer(tmp_path, model, disable_dropout=False)


def test_another_computation_in_training_mode_is_refused(tmp_path):
    model = noisy("opt")
    layer = model.model.decoder.layers[1].fc2
    plain = layer.forward
    layer.forward = lambda x: plain(x) * (1.01 if layer.training else 1.0)
    with pytest.raises(ValueError, match=r"its hidden states differ by 0\.\d+ of their norm"):
        make_trainer(tmp_path, model)


def test_the_probe_leaves_modes_and_random_states_as_they_were(tmp_path):
    model = fresh(lora(noisy("opt"), lora_dropout=0.3))
    NoiseOff(model)
    model.train()
    model.get_base_model().model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_noise_off(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_products_in_tf32_pass_for_rounding_where_they_may_be_made_so(tmp_path, monkeypatch):
    """A GPU's kernel depends on the shape: the same numbers, in another batch, come out a few 1e-4 away."""
    right = torch.nn.functional.linear

    def rough(inputs, *rest):
        product = right(inputs, *rest)
        generator = torch.Generator().manual_seed(product.numel())
        return product * (1 + 3e-4 * torch.randn(product.shape, generator=generator))

    monkeypatch.setattr(torch.nn.functional, "linear", rough)
    with pytest.raises(ValueError, match="to compute a row as it computes it alone"):
        make_trainer(tmp_path)
    torch.set_float32_matmul_precision("high")
    try:
        make_trainer(tmp_path)
    finally:
        torch.set_float32_matmul_precision("highest")
    weight = torch.ones(1)
    assert product_step(weight) == torch.finfo(torch.float32).eps
    assert product_step(weight.bfloat16()) == torch.finfo(torch.bfloat16).eps
