"""Eight chat templates as published models write them, each with a small tokenizer that has its special tokens."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "user assistant system model name a fruit and say why it is yes no maybe the river flows east and the sky is blue",
    "What is the capital of France? Paris is the capital. It's a city; 1 + 1 = 2.\n\nThink of it.\nAn apple, a pear.",
]


class Template(NamedTuple):
    """A template, the special tokens of its tokenizer, and the token that ends the assistant's turn."""

    source: str
    bos: str | None
    eos: str
    special: tuple[str, ...]
    end: str
    metaspace: bool = False
    # Added, but not special: written by Qwen3's template between header and response.
    added: tuple[str, ...] = ()
    system: bool = True


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m['content'].lstrip('\\n') + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
_LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end_of_sentence|>' }}"
    "{% elif m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)

TEMPLATES = {
    # On a base model, whose EOS is another token than the end of a turn.
    "chatml": Template(_CHATML, None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "qwen3": Template(
        _QWEN3, None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "<|im_end|>", added=("<think>", "</think>")
    ),
    "llama3": Template(
        _LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "gemma": Template(
        _GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", metaspace=True, system=False
    ),
    "phi3": Template(
        _PHI3, None, "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", metaspace=True
    ),
    "llama2": Template(_LLAMA2, "<s>", "</s>", (), "</s>", metaspace=True, system=False),
    "zephyr": Template(_ZEPHYR, "<s>", "</s>", (), "</s>", metaspace=True),
    "deepseek": Template(
        _DEEPSEEK, "<|begin|>", "<|end_of_sentence|>", ("<|User|>", "<|Assistant|>"), "<|end_of_sentence|>",
        added=("<think>", "</think>"),
    ),
}  # fmt: skip


@cache
def _core(name: str) -> str:
    template = TEMPLATES[name]
    special = [token for token in (template.bos, template.eos, *template.special, "<pad>") if token]
    if template.metaspace:
        core = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = sorted({*"".join(CORPUS).replace(" ", "▁"), *"[]/INST<>|_#:", *map(chr, range(33, 127))})
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
            initial_alphabet=alphabet, show_progress=False,
        )  # fmt: skip
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
    core.train_from_iterator(CORPUS * 4, trainer)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in template.added])
    rules = json.loads(core.to_str())
    # Bytes are in the vocabulary, and found by falling back only.
    rules["added_tokens"] = [token for token in rules["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(rules)


def chat_tokenizer(name: str, **changes: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a template, of a few hundred tokens."""
    template = TEMPLATES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(name)),
        **{"bos_token": template.bos, "eos_token": template.eos, "pad_token": "<pad>", **changes},
    )
    tokenizer.chat_template = template.source
    return tokenizer
