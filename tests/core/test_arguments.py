"""Bundles of arguments: an op's schema and the way there and back follow from their fields."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mopo_kernels.arguments import HeadInputs, HeadOptions, LogitTransform, LossOptions, OpArguments, PairBatch, bundle
from mopo_kernels.fused.linear_logprob import LinearLogprob, LinearLogprobBackward
from mopo_kernels.fused.linear_mopo_loss import LinearMOPOLoss
from mopo_kernels.fused.mopo_loss import MOPOLoss

BUNDLES = (LinearLogprob, LinearLogprobBackward, LinearMOPOLoss, MOPOLoss, HeadInputs, HeadOptions, PairBatch)


@pytest.mark.parametrize("kind", BUNDLES, ids=lambda kind: kind.__name__)
def test_a_bundle_is_put_back_from_the_values_it_was_taken_apart_into(kind: type[OpArguments]) -> None:
    values = [f"value of {name}" for name in kind.NAMES]
    again = kind.unflatten(values)
    assert again.flatten() == tuple(values)
    assert list(again.keywords().items()) == list(zip(kind.NAMES, values, strict=True))
    assert again == kind.unflatten(values)


@pytest.mark.parametrize("kind", BUNDLES, ids=lambda kind: kind.__name__)
def test_a_bundle_names_each_argument_once(kind: type[OpArguments]) -> None:
    assert len(set(kind.NAMES)) == len(kind.NAMES) == len(kind.TYPES)


def test_the_schema_is_that_of_the_fields() -> None:
    @bundle
    @dataclasses.dataclass(frozen=True)
    class Outer(OpArguments):
        tensor: Tensor
        transform: LogitTransform
        name: str | None

    assert Outer.schema() == "Tensor tensor, float? softcap, float logit_scale, float temperature, str? name"
    values = (torch.ones(1), LogitTransform(3.0, 0.5), None)
    assert Outer(*values).flatten() == (values[0], 3.0, 0.5, 1.0, None)
    assert Outer.gradients(tensor=values[0]) == (values[0], None, None, None, None)


def test_a_field_of_a_type_that_no_op_takes_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Wrong(OpArguments):
        numbers: list[int]

    with pytest.raises(KeyError, match="list"):
        bundle(Wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LossOptions(tau=0.0), "tau: expected a number in"),
        (LossOptions(max_ratio=0.5), "max_ratio: expected a number in"),
        (HeadOptions(transform=LogitTransform(temperature=0.0)), "temperature: expected a number in"),
        (HeadOptions(gradient_filter=1.0), "gradient_filter: expected"),
        (HeadOptions(ignore_index=1.5), "ignore_index: expected"),
    ],
)
def test_options_check_themselves(options: LossOptions | HeadOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options.check()
