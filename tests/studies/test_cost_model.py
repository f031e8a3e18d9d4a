"""docs/scaling.md says what studies/cost_model computes, and the model agrees with what can be counted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, PhiConfig, PretrainedConfig

from studies.cost_model import step_cost
from studies.cost_model.step_cost import ENGINES, Device, Plan, Work, memory, products, seconds, sizes

PHI = PhiConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)


def test_the_document_has_the_tables_of_the_script() -> None:
    text = step_cost.DOCUMENT.read_text(encoding="utf-8")
    assert step_cost.replaced(text) == text


def test_sizes_are_those_of_the_models() -> None:
    assert sizes("Phi 1.4B").total == 1_418_270_720
    assert sizes("Llama 7B").total == 6_738_415_616
    assert sizes("Llama 13B").total == 13_015_864_320
    assert sizes("Llama 70B").total == 70_553_706_496


def test_products_are_those_that_torch_counts() -> None:
    """Forward and backward of a small model with a trained head, nothing recomputed: 3 of each product."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_config(step_cost.TINY)
    rows = torch.zeros(2, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=rows).logits.sum().backward()
    counted = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "scaled_dot" not in str(name))
    tiny = step_cost.sizes_of(step_cost.TINY, "tiny")
    work = Work(prompts=1, prompt=0, responses=1, response=64)
    attention = 2 * 4.5 * 2 * work.attended * tiny.layers * tiny.hidden
    expected = products(tiny, work, Plan("DDP", False, 1)) - attention - 2 * work.tokens * tiny.layers * tiny.block
    # A block's norms are numbers that no product has.
    assert counted == pytest.approx(expected, rel=2e-3)


def test_one_device_is_one_device_with_every_engine() -> None:
    for lora in (True, False):
        each = {memory(sizes("Llama 7B"), Work(), Plan(engine, lora, 1)) for engine in ENGINES}
        assert len(each) == 1
        times = {seconds(sizes("Llama 7B"), Work(), Plan(engine, lora, 1), Device())[0] for engine in ENGINES}
        assert len(times) == 1


def test_shards_divide_what_they_divide() -> None:
    """From 64 to 1024 devices the sharded part goes, and only that: 15/16 of its 1/64."""
    model, work = sizes("Llama 70B"), Work()
    few, many = (memory(model, work, Plan("FSDP2", False, n)) for n in (64, 1024))
    whole = model.total * (2 + 2) + step_cost.optimizer(model, False)
    assert few - many == pytest.approx(whole * (1 / 64 - 1 / 1024), rel=1e-9)


def test_communication_sets_the_pace_where_the_network_is_slow() -> None:
    model, work, plan = sizes("Llama 70B"), Work(), Plan("FSDP2", False, 64)
    assert not seconds(model, work, plan, Device())[1]
    slow = dataclasses.replace(Device(), slow=5e9)
    assert seconds(model, work, plan, slow)[1]
    few = dataclasses.replace(work, prompts=3)
    assert seconds(model, few, plan, Device())[1]
    assert work.tokens * 3 / 8 < step_cost.hiding_tokens(model, False, Device()) < work.tokens


@pytest.mark.parametrize("config", [step_cost.TINY, PHI], ids=["Llama", "Phi"])
def test_what_a_block_keeps_is_what_a_real_one_keeps(config: PretrainedConfig) -> None:
    """With storage and 256 tokens, on the CPU: to a tenth, for the scores that 8 tokens have without blocks."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert step_cost.sizes_of(config, "a block").kept == pytest.approx(step_cost.kept_bytes(model, 256), rel=0.1)


@pytest.mark.parametrize("row", json.loads(step_cost.RECORD.read_text(encoding="utf-8"))["results"], ids=str)
def test_measured_bytes_and_times_are_those_of_the_model(row: dict) -> None:
    """Bytes to 2 %: norms, broadcast buffers and padding are not in eq. (3)."""
    assert sum(row["sent"].values()) == pytest.approx(row["expected"], rel=0.02, abs=1)
    assert row["seconds"] > row["products"] * 0.9


def test_bytes_are_counted_anew() -> None:
    """Two gloo ranks, now: a wrong count or a changed engine shows here, not only in the record."""
    jobs = [{"engine": engine, "lora": lora, "shape": "tiny", "steps": 2} for engine in ENGINES[:2] for lora in (0, 1)]
    for row in step_cost.launch(2, jobs, timeout=150):
        expected = step_cost.expected_traffic(step_cost.TINY, row["engine"], bool(row["lora"]), 2)
        assert sum(row["sent"].values()) == pytest.approx(expected, rel=0.02), row
