"""MOPOTrainer and its configuration (needs transformers; LoRA needs peft)."""

from mopo_kernels.trainer.checkpoint import WriteError, last_complete_checkpoint
from mopo_kernels.trainer.config import MOPOConfig
from mopo_kernels.trainer.trainer import MOPOTrainer, TrainingInterrupted

__all__ = ["MOPOConfig", "MOPOTrainer", "TrainingInterrupted", "WriteError", "last_complete_checkpoint"]
