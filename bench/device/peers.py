"""Peers whose kernels need a GPU, on the scored rows of a batch. See :mod:`bench.implementations`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import implementations
from bench.implementations import Implementation, Inputs, Result, import_error, on_scored_rows, plain_compacted

# Rows of a chunk, QuACK's own default.
QUACK_ROWS = 4096


def _cut_cross_entropy(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    # Without its filter, so that it does the work of the others.
    return -linear_cross_entropy(rows, weight, target, reduction="none", filter_eps=None, impl="cce")


def cut_cross_entropy(x: Inputs) -> Result:
    """Apple's kernel, unfiltered. Units: policy 4 (frozen 3; backward computes the products again), reference 1."""
    return on_scored_rows(x, _cut_cross_entropy)


def _rows(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    rows, target, _ = implementations.pack_responses(x.hidden, x.labels)
    return rows, implementations.pack_responses(x.ref_hidden, x.labels)[0], target


def quack(x: Inputs) -> Result:
    """QuACK's chunked cross-entropy, summed over the tokens: it reduces to a number, and so serves no loss of
    sequences. Without gradients, as for the reference, it takes a path of its own that stores no logits. Units: policy
    3, reference 1."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    rows, ref_rows, target = _rows(x)
    options: dict[str, Any] = {"chunk_size": QUACK_ROWS, "reduction": "sum"}
    with torch.no_grad():
        chunked_linear_cross_entropy(ref_rows, x.weight, target, **options)
    loss = chunked_linear_cross_entropy(rows, x.weight, target, **options)
    return loss, *torch.autograd.grad(loss, x.leaves())


def plain_cross_entropy(x: Inputs) -> Result:
    """What QuACK's implementation is held against."""
    rows, _, target = _rows(x)
    loss = F.cross_entropy((rows @ x.weight.T).float(), target, reduction="sum")
    return loss, *torch.autograd.grad(loss, x.leaves())


GPU_PEERS: dict[str, Implementation] = {
    "cut-cross-entropy": Implementation(
        cut_cross_entropy, plain_compacted, unavailable=lambda: import_error("cut_cross_entropy")
    ),
    "QuACK": Implementation(
        quack, plain_cross_entropy, "sum of cross-entropies", lambda: import_error("quack.linear_cross_entropy")
    ),
}
