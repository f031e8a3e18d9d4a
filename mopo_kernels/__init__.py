"""Fused losses for multi-objective preference optimisation (MOPO, arXiv 2505.10892).

Maximise a primary preference while others stay above thresholds, straight from pairwise preferences. Importing this
package needs torch alone; what lies behind ``MOPOTrainer`` and the data loaders is imported when first used.
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
from mopo_kernels.losses import LinearMOPOLoss

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
