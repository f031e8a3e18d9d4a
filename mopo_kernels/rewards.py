"""Reward models as judges: sequence-classification models that score responses in batches.

A judge is anything that scores a response (see ``evaluation``); this is the one for reward models on the hub. The
network is loaded at the first score, so that a file with many of them costs nothing to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# What the classifier reads: one text, or two that its tokenizer joins.
Texts = tuple[str, str | None]


def prompt_and_response(prompt: str, response: str) -> Texts:
    """Both, as the two texts of a pair."""
    return prompt, response


class RewardModel:
    """A sequence-classification model as a judge: one of its outputs is the score, in its own unit.

    Scores do not depend on what else is in a batch, beyond rounding: padding is masked.

    Args:
        model: folder or hub name, of the tokenizer too.
        texts: what it reads of a prompt and a response; default: both, as a pair.
        output: index of the output that is the score (a logit).
        outputs: how many there are, for models whose configuration leaves that to the architecture's default.
        batch_size: responses scored together.
        max_length: tokens; longer inputs are cut at their end, the longer one of a pair first.
        revision: on the hub.
        device: default the first CUDA device, else the CPU.
        dtype: of the weights. In bfloat16 a score has 8 bits, and near responses tie.

    Raises:
        ValueError: an argument out of range, or at the first score a model that has no such output or no token to pad
            with; OSError where it cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        texts: Callable[[str, str], Texts] = prompt_and_response,
        output: int = 0,
        outputs: int | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value, least in (("output", output, 0), ("batch_size", batch_size, 1), ("max_length", max_length, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}; got {value}")
        self.model = str(model)
        self.texts = texts
        self.output = output
        self.outputs = outputs
        self.batch_size = batch_size
        self.max_length = max_length
        self.revision = revision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self._loaded: tuple[Any, Any] | None = None

    def _load(self) -> tuple[Any, Any]:
        """(network, tokenizer)."""
        if self._loaded is None:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            options: dict[str, Any] = {} if self.outputs is None else {"num_labels": self.outputs}
            network = AutoModelForSequenceClassification.from_pretrained(
                self.model, revision=self.revision, dtype=self.dtype, trust_remote_code=False, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.revision, trust_remote_code=False)
            if self.output >= network.config.num_labels:
                raise ValueError(
                    f"output: expected a number below the {network.config.num_labels} outputs of {self.model}; "
                    f"got {self.output}"
                )
            if tokenizer.pad_token is None:
                if tokenizer.eos_token is None:
                    raise ValueError(f"model: expected a token to pad with; got none in {self.model}")
                tokenizer.pad_token = tokenizer.eos_token
            if network.config.pad_token_id is None:
                # Decoders score at their last token that is not this one: they do not look at the mask.
                network.config.pad_token_id = tokenizer.pad_token_id
            tokenizer.padding_side = "right"
            self._loaded = network.to(self.device).eval(), tokenizer
        return self._loaded

    def __call__(self, prompt: str, response: str) -> float:
        """The score of one response."""
        return self.score_batch([prompt], [response])[0]

    def score_batch(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The scores of responses, each to the prompt of its place, in that order."""
        network, tokenizer = self._load()
        # Some tokenizers know no limit of their own and say so by a very large number.
        limit = min(self.max_length, tokenizer.model_max_length)
        encoded = []
        for prompt, response in zip(prompts, responses, strict=True):
            first, second = self.texts(prompt, response)
            encoded.append(tokenizer(first, second, truncation=True, max_length=limit))
        # Of similar length together: little padding.
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
        scores = [0.0] * len(encoded)
        with torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = tokenizer.pad(
                    {key: [encoded[row][key] for row in rows] for key in encoded[0]}, return_tensors="pt"
                )
                logits = network(**batch.to(self.device)).logits[:, self.output].double().tolist()
                for row, value in zip(rows, logits, strict=True):
                    scores[row] = value
        return scores
