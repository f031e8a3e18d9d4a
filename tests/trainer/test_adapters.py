"""Adapters that were trained before: the reference is the policy as training starts, whatever acts in it."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from trainer_samples import fresh, lora, make_config, make_data, make_model, make_tokenizer, make_trainer

from mopo_kernels import cli
from mopo_kernels.cli.train import load_model, parse, train
from mopo_kernels.data import PreferenceCollator
from mopo_kernels.trainer import MOPOTrainer
from mopo_kernels.trainer.adapters import adapters_add_nothing
from mopo_kernels.trainer.reference_model import fingerprint


def over_frozen(model, **changes):
    """A new adapter that is trained over a frozen one."""
    from peft import LoraConfig

    model.add_adapter("new", LoraConfig(**{"r": 2, "target_modules": ["q_proj", "o_proj"], **changes}))
    model.base_model.set_adapter(["new", "default"])
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.requires_grad_(False)
    return model


def dora(model):
    return lora(model, use_dora=True)


def trained_embeddings(model):
    """LoRA on the embeddings: A is 0 for tokens that were not trained on."""
    model = fresh(lora(model, target_modules=["q_proj", "embed_tokens"]))
    layer = model.get_base_model().model.embed_tokens
    with torch.no_grad():
        layer.lora_embedding_A["default"].zero_()[:, 40] = 1.0
        layer.lora_embedding_B["default"].fill_(0.3)
    return model


def trained_head(model):
    model = fresh(lora(model, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight[33] += 1.0
    return model


STARTS = {
    "an adapter": lora,
    "a frozen adapter under a new one": lambda model: over_frozen(lora(model)),
    "DoRA": dora,
    "one token's embedding": trained_embeddings,
    "one row of a head saved whole": trained_head,
    "dropout in the adapter": lambda model: lora(model, lora_dropout=0.3),
    "random factors": lambda model: lora(model, init_lora_weights=False),
}


@pytest.mark.parametrize(
    ("start", "reference"),
    [*((start, "model") for start in STARTS), *((start, "precomputed") for start in [*STARTS][:2])],
)
def test_at_learning_rate_0_the_policy_is_the_reference(start, reference, tmp_path):
    model = STARTS[start](make_model())
    trainer = make_trainer(
        tmp_path, model, reference=reference, learning_rate=0.0, shared_prompts="never", eval_dataset=make_data(3, 9)
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "kl" in line]
    assert lines
    for line in lines:
        assert line["kl"] == pytest.approx(0, abs=1e-6)
        assert line["in_sample/satisfaction/helpful"] == pytest.approx(0.5, abs=1e-6)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(0, abs=1e-6)


def test_a_trained_adapter_moves_away_from_where_it_started_and_a_copy_keeps_that(tmp_path):
    model = lora(make_model())
    trainer = make_trainer(tmp_path, model, reference="model", learning_rate=1e-2)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert [line["kl"] for line in trainer.state.log_history if "kl" in line][-1] > 1e-4
    initial = trainer.reference.initial
    assert initial is not None
    assert all(torch.equal(initial[name], value) for name, value in start.items())


def test_only_what_adds_nothing_is_switched_off():
    assert adapters_add_nothing(fresh(lora(make_model())))
    assert adapters_add_nothing(fresh(lora(make_model(), modules_to_save=["lm_head"])))
    for make in STARTS.values():
        assert not adapters_add_nothing(make(make_model()))
    assert adapters_add_nothing(over_frozen(fresh(lora(make_model()))))


def test_the_key_of_a_reference_file_covers_the_adapters_that_act():
    base = fingerprint(make_model())
    assert fingerprint(fresh(lora(make_model()))) == base
    tuned = lora(make_model())
    stacked = over_frozen(lora(make_model()))
    scaled = copy.deepcopy(tuned)
    scaled.get_base_model().model.layers[0].self_attn.q_proj.set_scale("default", 0.5)
    found = [fingerprint(model) for model in (tuned, stacked, scaled)]
    assert len({base, *found}) == 4
    with torch.no_grad():
        tuned.get_base_model().model.layers[1].self_attn.v_proj.lora_A["default"].weight[2, 3] += 1e-3
        stacked.get_base_model().model.layers[1].self_attn.v_proj.lora_A["default"].weight[2, 3] += 1e-3
    assert fingerprint(tuned) != found[0]
    assert fingerprint(stacked) != found[1]


# ------------------------------------------------------------------------------------------------ several that act


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_a_policy_of_several_adapters_is_saved_as_one_and_resumed_bit_for_bit(tmp_path):
    from peft import PeftModel

    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    runs = {}
    for name, steps in (("whole", 4), ("half", 2)):
        trainer = make_trainer(tmp_path / name, over_frozen(lora(make_model())), max_steps=steps, **settings)
        trainer.train()
        runs[name] = trainer
    trainer = make_trainer(tmp_path / "half", over_frozen(lora(make_model())), max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    for (name, expected), (_, found) in zip(
        runs["whole"].model.named_parameters(), trainer.model.named_parameters(), strict=True
    ):
        assert torch.equal(expected, found), name
    trainer.save_model(str(tmp_path / "saved"))
    saved = PeftModel.from_pretrained(make_model(), tmp_path / "saved")
    assert list(saved.peft_config) == ["default"]
    torch.testing.assert_close(logits(saved), logits(trainer.model), rtol=1e-5, atol=1e-5)
    assert (logits(saved) - logits(lora(make_model()))).abs().max() > 1e-2


def test_adapters_that_do_not_act_are_refused(tmp_path):
    merged = lora(make_model())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="model: expected adapters beside the weights; got default merged into"):
        make_trainer(tmp_path, merged)
    off = lora(make_model())
    off.base_model.disable_adapter_layers()
    for parameter in (value for name, value in off.named_parameters() if "lora" in name):
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="model: expected adapters that are switched on; got them off in"):
        make_trainer(tmp_path, off)


def test_a_model_whose_weights_are_not_finite_is_refused_as_such(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    for start in (model, lora(copy.deepcopy(model))):
        with pytest.raises(ValueError, match="model: expected numbers for logits of LlamaForCausalLM; got NaN"):
            make_trainer(tmp_path, start)


def test_adapters_that_cannot_be_saved_as_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected plain LoRA adapters where several are active.*use_dora"):
        make_trainer(tmp_path, over_frozen(dora(make_model())))


# -------------------------------------------------------------------------------------------------------- mopo train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    from transformers import AutoModelForCausalLM

    lora(AutoModelForCausalLM.from_pretrained(folder / "model")).save_pretrained(folder / "sft")
    make_data(12).save(folder / "train.jsonl")
    settings = {
        "model_name_or_path": str(folder / "sft"),
        "train_file": str(folder / "train.jsonl"),
        "thresholds": {"brief": 0.45},
        "tau": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize("more", [(), ("--lora_r", "2")], ids=["trained further", "under a new one"])
def test_mopo_train_continues_an_adapter(more, files, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    arguments = ["--config", str(files / "config.yaml"), *more]
    model = load_model(parse([*arguments, "--output_dir", str(tmp_path)])[0], torch.device("cpu"))
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), files / "sft")
    torch.testing.assert_close(logits(model), logits(tuned))
    assert any(p.requires_grad for p in model.parameters())
    assert all(not p.requires_grad for name, p in model.named_parameters() if ".under." in name)
    for rate in ("0.0", "1e-2"):
        train([*arguments, "--output_dir", str(tmp_path / rate), "--learning_rate", rate])
        saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(files / "model"), tmp_path / rate)
        moved = float((logits(saved) - logits(tuned)).abs().max())
        assert moved < 1e-5 if rate == "0.0" else moved > 1e-3
    assert "'kl': '0'" in capsys.readouterr().out
    card = (tmp_path / rate / "README.md").read_text()
    assert "| Reference | the policy as training started |" in card


def test_what_an_adapter_folder_cannot_do_is_refused_in_one_line(files, tmp_path, capsys):
    common = ["train", "--config", str(files / "config.yaml"), "--output_dir", str(tmp_path / "run")]
    assert cli.main([*common, "--random_weights", "true"]) == 2
    assert "random_weights: expected false with an adapter" in capsys.readouterr().err
    lost = tmp_path / "lost"
    lost.mkdir()
    for file in (files / "sft").iterdir():
        content = file.read_bytes().replace(str(files / "model").encode(), str(tmp_path / "gone").encode())
        (lost / file.name).write_bytes(content)
    assert cli.main([*common, "--model_name_or_path", str(lost)]) == 2
    assert f"{tmp_path / 'gone'} cannot be loaded" in capsys.readouterr().err
    assert cli.main([*common, "--dry_run", "true"]) == 0


def test_a_collator_of_ones_own_and_no_training_data_still_evaluate_from_the_start(tmp_path):
    """The copy is there whoever asks first."""
    trainer = MOPOTrainer(
        lora(make_model()),
        make_config(tmp_path, objectives=["helpful", "brief"]),
        PreferenceCollator(make_tokenizer(), ("helpful", "brief")),
        eval_dataset=make_data(3),
    )
    assert trainer.evaluate()["eval_kl"] == pytest.approx(0, abs=1e-6)
