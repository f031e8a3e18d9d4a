"""The model card: every figure is one that was measured, or the card says that it was not."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard
from trainer_samples import STEERED, lora, make_data, make_dual_data, make_model, make_trainer

from mopo_kernels.trainer.model_card import model_card


def rows(card):
    """First cell -> the others, of both tables."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line[:1] == "|"
    ]
    return {first: rest for first, *rest in cells}


def test_before_training_nothing_is_claimed(tmp_path):
    trainer = make_trainer(tmp_path, lora(make_model()))
    table = rows(model_card(trainer))
    assert table["helpful"] == ["maximised", "", "", "not measured", "", "not measured", ""]
    start = f"{trainer.dual.multiplier['brief']:.4f}"
    assert table["brief"] == ["held", "0.4", start, "not measured", "not measured", "not measured", "not measured"]
    assert table["Dual data"] == ["none"]
    assert table["Held-out KL to the first reference"] == ["not measured"]
    assert table["Held-out data"] == ["none"]
    assert table["Optimizer steps"] == ["0"]


def test_a_saved_adapter_states_what_it_was_trained_for_and_what_was_measured(tmp_path):
    trainer = make_trainer(
        tmp_path,
        lora(make_model()),
        eval_dataset=make_data(6, seed=3),
        tau=0.7,
        estimator="snis",
        seed=5,
        dual_dataset=make_dual_data(5),
        **STEERED,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    table = rows(card)
    value, error = trainer.measurement.satisfaction, trainer.measurement.standard_error
    assert table["helpful"][0] == "maximised"
    assert table["helpful"][3] == f"{value['helpful']:.4f} ± {error['helpful']:.4f}"
    assert table["brief"] == [
        "held",
        "0.4",
        f"{trainer.dual.multiplier['brief']:.4f}",
        f"{value['brief']:.4f} ± {error['brief']:.4f}",
        f"{value['brief'] - 0.4:+.4f}",
        f"{metrics['eval_satisfaction/brief']:.4f} ± {metrics['eval_standard_error/brief']:.4f}",
        f"{metrics['eval_slack/brief']:+.4f}",
    ]
    assert "labels of 5 prompts after step 2. Held-out: measured after step 2." in card.text
    assert table["Dual data"][0].startswith("5 prompts, ")
    pairs = sum(len(example.pairs) for example in make_data())
    assert table["Training data"] == [f"8 prompts, {pairs} pairs"]
    assert table["Held-out data"][0].startswith("6 prompts, ")
    assert table["Optimizer steps"] == ["2 of 2 planned"]
    assert table["Weights"] == ["after step 2"]
    assert table["Trained"] == ["LORA adapter of rank 3, alpha 5"]
    assert (table["tau"], table["loss_type"], table["Seed"]) == (["0.7"], ["regression"], ["5"])
    assert table["estimator"][0].startswith("snis ")
    assert re.search(r"mopo-kernels \S+, torch \S+, transformers \S+, peft \S+", table["Versions"][0])
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags


def test_full_fine_tuning_and_an_objective_without_threshold(tmp_path):
    trainer = make_trainer(tmp_path, thresholds={}, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    card = ModelCard.load(tmp_path / "final" / "README.md")
    table = rows(card)
    assert table["Trained"] == ["every weight"]
    assert (table["brief"][0], table["brief"][1], table["brief"][2]) == ("watched", "", "")
    assert "no threshold was set" in card.text
    assert card.data.library_name == "transformers"


def test_weights_of_the_best_checkpoint_come_with_its_figures(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_data(6, seed=3),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        # Another than the last is the best by this.
        metric_for_best_model="kl_first",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best is not None
    assert best < 4
    (line,) = [line for line in trainer.state.log_history if line["step"] == best and "eval_satisfaction/brief" in line]
    table = rows(model_card(trainer))
    assert table["Weights"][0].startswith(f"of step {best}, the best by kl_first (")
    assert table["brief"][5].startswith(f"{line['eval_satisfaction/brief']:.4f} ± ")
    assert table["Held-out KL to the first reference"] == [f"{line['eval_kl_first']:.4g} nats a response"]
    assert f"Held-out: measured after step {best}." in model_card(trainer).text


def test_a_checkpoint_has_a_card_of_its_own_step(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    for step in (1, 2):
        table = rows(ModelCard.load(tmp_path / f"checkpoint-{step}" / "README.md"))
        assert table["Optimizer steps"] == [f"{step} of 2 planned"]


@pytest.mark.parametrize("name", ["some/model", "a folder/model"])
def test_only_a_hub_name_is_linked(name, tmp_path):
    card = model_card(make_trainer(tmp_path), name)
    assert card.data.get("base_model") == (name if name == "some/model" else None)
    assert rows(card)["Base model"] == [name]
