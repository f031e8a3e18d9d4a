"""Attention over one row in which every prompt stands once: a response sees its prompt and itself.

Three ways through transformers' own attention interfaces, by the model's ``attn_implementation``. With ``sdpa`` an
attention function registered here takes prompt after prompt and response after response, so that nothing is computed
which the mask would throw away; where a model does not hand its keyword arguments down to it, a boolean mask of the
whole row serves. With ``flex_attention`` it is a ``BlockMask``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mopo_kernels.trainer.lm_head import causal_lm, product_step
from mopo_kernels.transfer import to_device

SEGMENTED = "sdpa_shared_prompts"


class Segments(NamedTuple):
    """A row cut into prompts and responses.

    Args:
        lengths: tokens of each prompt and of each of its responses, in the row's order.
        counts: responses of each prompt.
        masks: per response (1, 1, R, P + R) bool, what its R tokens see of the P prompt tokens and of themselves.
    """

    lengths: list[int]
    counts: list[int]
    masks: list[Tensor]

    @staticmethod
    def of(segment_length: Tensor, response_count: Tensor, device: torch.device) -> Segments:
        """From what ``PreferenceCollator`` says of the row, read on the CPU; the masks are made on ``device``."""
        lengths, counts = segment_length.tolist(), response_count.tolist()
        masks = []
        seen: dict[tuple[int, int], Tensor] = {}
        for prompt, responses in groups(lengths, counts):
            for tokens in responses:
                if (prompt, tokens) not in seen:
                    whole = torch.ones(1, 1, tokens, prompt + tokens, dtype=torch.bool, device=device)
                    seen[prompt, tokens] = whole.tril(prompt)
                masks.append(seen[prompt, tokens])
        return Segments(lengths, counts, masks)


def groups(lengths: list[int], counts: list[int]) -> Iterator[tuple[int, list[int]]]:
    """Tokens of a prompt and of its responses, prompt after prompt."""
    start = 0
    for responses in counts:
        yield lengths[start], lengths[start + 1 : start + 1 + responses]
        start += 1 + responses


def sdpa_shared_prompts(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, segment after segment when there are any: (1, heads, L, D) -> (1, L, heads, D)."""
    if segments is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    if attention_mask is None or attention_mask.numel() != 1:
        raise ValueError("its layers make a mask of their own")
    # One split and one cat, as the gradient of a slice is as long as the whole row.
    queries, keys, values = (tensor.split(segments.lengths, dim=2) for tensor in (query, key, value))
    parts = []
    masks = iter(segments.masks)
    place = 0
    for responses in segments.counts:
        prompt = place
        for here in range(place, place + 1 + responses):
            if here == prompt:
                seen, mask = (keys[here], values[here]), None
            else:
                seen = (torch.cat([keys[prompt], keys[here]], dim=2), torch.cat([values[prompt], values[here]], dim=2))
                mask = next(masks)
            if segments.lengths[here]:
                part, _ = sdpa_attention_forward(module, queries[here], *seen, mask, **kwargs)
                parts.append(part)
        place += 1 + responses
    return torch.cat(parts, dim=1), None


AttentionInterface.register(SEGMENTED, sdpa_shared_prompts)
# Whoever calls the model otherwise, generation included, gets the masks of sdpa.
AttentionMaskInterface.register(SEGMENTED, sdpa_mask)


def _indices(segment_length: Tensor, response_count: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token of the row: which prompt it belongs to, and which response, or -1; on ``device``."""
    segments = int(segment_length.numel())
    kind = torch.zeros(segments, dtype=torch.int64)
    first = torch.cumsum(response_count + 1, 0) - (response_count + 1)
    kind[first] = 1
    prompt = torch.cumsum(kind, 0) - 1
    response = torch.where(kind == 1, -1, torch.arange(segments))
    # Told the size, which on the meta device, or without storage, nothing else could tell.
    tokens = sum(segment_length.tolist())
    prompt, response = (x.repeat_interleave(segment_length, output_size=tokens) for x in (prompt, response))
    return to_device(prompt, device), to_device(response, device)


def row_mask(segment_length: Tensor, response_count: Tensor, device: torch.device) -> Tensor:
    """What every token of the row sees: (1, 1, L, L) bool on ``device``."""
    prompt, response = _indices(segment_length, response_count, device)
    same = (prompt[:, None] == prompt) & ((response == -1) | (response[:, None] == response))
    return same.tril()[None, None]


def block_mask(segment_length: Tensor, response_count: Tensor, device: torch.device) -> Any:
    """The same as a ``torch.nn.attention.flex_attention.BlockMask``."""
    from torch.nn.attention.flex_attention import create_block_mask

    prompt, response = _indices(segment_length, response_count, device)

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (prompt[q] == prompt[k]) & ((response[k] == -1) | (response[q] == response[k]))

    tokens = prompt.numel()
    return create_block_mask(sees, None, None, tokens, tokens, device=prompt.device)


def attention_arguments(
    model: nn.Module, segment_length: Tensor, response_count: Tensor, device: torch.device
) -> dict[str, Any]:
    """What the backbone's forward takes for such a row on ``device``, by the attention that ``share_prompts`` has
    settled on; the row's description is on the CPU."""
    implementation = causal_lm(model).config._attn_implementation
    if implementation == SEGMENTED:
        # A mask of four dimensions is passed on as it is: this one only says that none is to be made.
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {"attention_mask": nothing, "segments": Segments.of(segment_length, response_count, device)}
    if implementation == "flex_attention":
        return {"attention_mask": block_mask(segment_length, response_count, device)}
    return {"attention_mask": row_mask(segment_length, response_count, device)}


def share_prompts(model: nn.Module, max_length: int | None) -> str | None:
    """Settle how ``model`` attends over such rows; None if it can, or why it cannot.

    A model's own attention is tried on a few tokens: hidden states must be those of separate rows.

    Args:
        model: with ``attn_implementation`` sdpa or flex_attention.
        max_length: most tokens of a prompt and a response together, which a sliding window must cover.
    """
    base = causal_lm(model)
    implementation = base.config._attn_implementation
    if implementation not in ("sdpa", SEGMENTED, "flex_attention"):
        return f"attn_implementation is {implementation}, not sdpa or flex_attention"
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(others))}"
    windows = [getattr(config, "keep_window_size", None)]
    if not kinds or "sliding_attention" in kinds:
        windows.append(getattr(config, "sliding_window", None))
    for window in windows:
        if window is not None and (max_length is None or max_length > window):
            return f"its layers see {window} tokens, and max_length is {max_length}"
    choices = ["flex_attention"] if implementation == "flex_attention" else [SEGMENTED, "sdpa"]
    failure = "its attention cannot be set"
    for choice in choices:
        base.set_attn_implementation(choice)
        if base.config._attn_implementation != choice:
            continue
        try:
            difference = _difference_from_separate_rows(model)
        except Exception as error:  # whatever a model's forward says to a row that it was not written for
            failure = f"its forward fails over a shared prompt: {' '.join(str(error).split())[:200]}"
            continue
        # A token that sees what it must not moves hidden states by tenths of their norm.
        if difference <= max(1e-4, 8 * product_step(next(base.parameters()))):
            return None
        failure = f"its hidden states over a shared prompt are off by {difference:.2g} of their norm"
    base.set_attn_implementation("sdpa" if implementation == SEGMENTED else implementation)
    return failure


@torch.no_grad()
def _difference_from_separate_rows(model: nn.Module) -> float:
    """Of the hidden states over two prompts with two responses each, relative to their norm."""
    base = causal_lm(model)
    device = base.get_input_embeddings().weight.device
    shape = [(3, [2, 3]), (2, [3, 1])]
    vocabulary = base.get_input_embeddings().weight.shape[0]
    length = [tokens for prompt, responses in shape for tokens in (prompt, *responses)]
    total = sum(length)
    ids = (torch.arange(total, device=device) * 7 + 3) % vocabulary
    segments, counts = torch.tensor(length), torch.tensor([len(responses) for _, responses in shape])
    positions = torch.cat(
        [
            torch.arange(tokens, device=device) + (0 if prompt is None else prompt)
            for before, responses in shape
            for prompt, tokens in ((None, before), *((before, response) for response in responses))
        ]
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        shared = base.base_model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            **attention_arguments(model, segments, counts, device),
        ).last_hidden_state[0]
        starts = [0, *accumulate(length)]
        place, found, expected = 0, [], []
        for before, responses in shape:
            prompt = slice(starts[place], starts[place] + before)
            for offset in range(1, 1 + len(responses)):
                own = slice(starts[place + offset], starts[place + offset + 1])
                row = torch.cat([ids[prompt], ids[own]])[None]
                alone = base.base_model(input_ids=row, use_cache=False).last_hidden_state[0]
                expected.append(alone)
                found.append(torch.cat([shared[prompt], shared[own]]))
            place += 1 + len(responses)
    finally:
        for module, training in modes:
            module.training = training
    truth = torch.cat(expected).float()
    return float((torch.cat(found).float() - truth).norm() / truth.norm())


@torch.no_grad()
def check_padded_rows(model: nn.Module) -> None:
    """Try whether a row has the hidden states that it has alone when it is padded beside a longer one.

    Raises:
        ValueError: it has others, as where a model looks at what follows, or its rows share something.
    """
    base = causal_lm(model)
    embedding = base.get_input_embeddings().weight
    ids = (torch.arange(20, device=embedding.device) * 7 + 3).reshape(2, 10) % embedding.shape[0]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        together = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = [
            base.base_model(
                input_ids=ids[row : row + 1, :length], attention_mask=mask[row : row + 1, :length], use_cache=False
            ).last_hidden_state[0]
            for row, length in ((0, 4), (1, 10))
        ]
    finally:
        for module, training in modes:
            module.training = training
    alone = torch.cat(rows).float()
    if not alone.isfinite().all():
        # Nothing to compare with: log-probabilities that are not finite are an error of their own.
        return
    found = torch.cat([together[0, :4], together[1]]).float()
    difference = float((found - alone).norm() / alone.norm())
    if not difference <= max(1e-4, 8 * product_step(embedding)):
        raise ValueError(
            f"model: expected {type(base).__name__} to compute a row as it computes it alone; padded beside a longer "
            f"one its hidden states are off by {difference:.2g} of their norm, and so would log-probabilities be"
        )
