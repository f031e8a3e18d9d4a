"""Tiny random networks of the architectures that public reward models have, and the tokenizers to go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{index}" for index in range(40)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<bos>"]
POSITIONS = 64


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words by white space. GPT-2's adds no special tokens and has none to pad with; the others put marks around."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options: dict[str, Any] = {"eos_token": "<eos>", "unk_token": "<unk>", "model_max_length": POSITIONS}
    if kind == "gpt2":
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<eos>", **options)
    # BART's own form of a pair; every text then has as many <eos> as any other, which its classifier asks for.
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> <eos> $B <eos>", special_tokens=[("<bos>", 3), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", pad_token="<pad>", **options)


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """A random classifier in ``folder``: GPT-2 with one output, BART and DistilBERT with two."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"vocab_size": len(SPECIAL) + len(WORDS), "num_labels": 1 if kind == "gpt2" else 2}
    network: Any
    if kind == "gpt2":
        network = GPT2ForSequenceClassification(
            GPT2Config(**size, n_positions=POSITIONS, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0)
        )
        network.config.pad_token_id = None
    elif kind == "bart":
        network = BartForSequenceClassification(
            BartConfig(
                **size,
                max_position_embeddings=POSITIONS,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                init_std=1.0,
                pad_token_id=0,
                bos_token_id=3,
                eos_token_id=1,
                decoder_start_token_id=1,
                forced_eos_token_id=1,
            )
        )
    else:
        network = DistilBertForSequenceClassification(
            DistilBertConfig(
                **size,
                max_position_embeddings=POSITIONS,
                dim=16,
                n_layers=2,
                n_heads=2,
                hidden_dim=32,
                initializer_range=1.0,
                pad_token_id=0,
            )
        )
    network.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder
