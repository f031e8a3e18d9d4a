"""Fused losses for multi-objective preference optimisation (MOPO, arXiv 2505.10892).

Maximise a primary preference while others stay above thresholds, straight from pairwise preferences. Importing this
package needs torch alone; what lies behind ``MOPOTrainer`` and the data loaders is imported when first used.

The life of a call, with N tokens, H hidden, V vocabulary, S sequences, P pairs, and tiles of R rows and W columns::

    linear_mopo_loss                        functional.py: hidden (N, H), weight (V, H), target (N,), cu_seqlens
    |                                       (S + 1,), pairs (P, 2) go into the bundles of arguments.py, checked
    +- mopo::linear_mopo_loss               fused/linear_mopo_loss.py: the custom op, and the order of the chunks
       +- ChunkedHead.forward               fused/chunked_head.py: rows (R, H) -> logprob (R,), logsumexp (R,)
       |  +- linear_lse_fwd                 backends/triton/: (R, H), (W, H) -> row_max, sum_exp, target_logit (R,),
       |  |                                 exp_logits (R, W), in half precision; or else
       |  +- a product (R, W), lse_fwd      backends/: of each tile -> row_max, sum_exp, target_logit (R,)
       +- segment_sum                       logprob (N,) -> (S,)
       +- token_grad_logprob                sequences' logprob (S,) -> grad_logprob (N,)
       +- ChunkedHead.backward              grad_logprob (R,) -> dhidden (N, H), dweight (V, H), dbias (V,)
       |  +- logits_bwd_, exp_logits_bwd_   backends/: a tile (R, W) becomes its gradient in place, then products
       +- pair_loss_fwd                     the loss (), margins (P,), satisfaction (K,) from sequences' logprob (S,)

    linear_logprob                          the same without pairs: fused/linear_logprob.py, forward and backward
    mopo_loss                               from logprob (S,): fused/mopo_loss.py
    naive.py, naive_grad.py                 every equation once, in plain PyTorch: what all of it is tested against
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mopo_kernels.functional import (
    MOPOLossOutput,
    linear_logprob,
    linear_mopo_loss,
    linear_sequence_logprob,
    mopo_loss,
    pack_responses,
)
from mopo_kernels.modules import LinearMOPOLoss

if TYPE_CHECKING:
    from mopo_kernels import tabular
    from mopo_kernels.data import PreferenceCollator, PreferenceExample, load_preferences
    from mopo_kernels.dual import DualAscent
    from mopo_kernels.trainer import MOPOConfig, MOPOTrainer

__version__ = "0.1.0"

_LAZY = {
    "DualAscent": "mopo_kernels.dual",
    "PreferenceExample": "mopo_kernels.data",
    "PreferenceCollator": "mopo_kernels.data",
    "load_preferences": "mopo_kernels.data",
    "MOPOConfig": "mopo_kernels.trainer",
    "MOPOTrainer": "mopo_kernels.trainer",
    "tabular": "mopo_kernels.tabular",
}

__all__ = [
    "DualAscent",
    "LinearMOPOLoss",
    "MOPOConfig",
    "MOPOLossOutput",
    "MOPOTrainer",
    "PreferenceCollator",
    "PreferenceExample",
    "linear_logprob",
    "linear_mopo_loss",
    "linear_sequence_logprob",
    "load_preferences",
    "mopo_loss",
    "pack_responses",
    "tabular",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mopo_kernels' has no attribute {name!r}")
    try:
        module = import_module(_LAZY[name])
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} needs {error.name}: pip install 'mopo-kernels[train]'", name=error.name) from error
    return module if name == "tabular" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
