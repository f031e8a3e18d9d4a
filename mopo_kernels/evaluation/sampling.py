"""Responses drawn from a causal language model, exactly from its distribution."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mopo_kernels.data.rendering import Renderer
from mopo_kernels.evaluation.progress import progress_bar
from mopo_kernels.evaluation.prompts import Prompt

# Tokens sampled before those sequences that have ended leave a batch: each time costs about a tenth of a token's time.
_STEPS_BETWEEN_LEAVING = 4


@contextlib.contextmanager
def _plain_sampling(model: Any) -> Iterator[None]:
    """Evaluation mode, and a generation config that alters nothing (no repetition penalty, no banned words)."""
    from transformers import GenerationConfig

    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [owner.generation_config for owner in owners]
    training = model.training
    model.eval()
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config
        model.train(training)


def _draws(temperature: float, top_p: float) -> Any:
    """Logits processors after which only the token drawn is left; at temperature 0 none.

    From the distribution as it is, no token cut off but by top_p.
    """
    from transformers import LogitsProcessorList
    from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

    processors: list[Any] = []
    if temperature > 0.0:
        processors += [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
        processors += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []
        processors.append(_draw_token)
    return LogitsProcessorList(processors)


def _draw_token(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """0 at one token a row, drawn from the softmax of the scores, and -inf elsewhere.

    By inverting the distribution function, one random number a row: torch.multinomial draws one a token of the
    vocabulary, on a CPU in one thread, which can take as long as the model does.
    """
    cumulative = scores.float().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total, which rounding may leave a little off 1: a token of probability 0 at the end is not drawn.
    at = torch.rand_like(total) * total
    token = torch.searchsorted(cumulative, torch.minimum(at, total.nextafter(torch.zeros_like(total))), right=True)
    return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def _sample_batch(model: Any, prompts: Sequence[Sequence[int]], options: Mapping[str, Any]) -> list[list[int]]:
    """Token ids sampled after each prompt, with the pad token after the end.

    As one `model.generate` on left-padded prompts, with less work where the model's cache can be continued: equal
    prompts share one forward pass, and every few tokens the sequences that have ended leave the batch.
    """
    device, pad = model.device, options["pad_token_id"]
    width = max(len(ids) for ids in prompts)
    gaps = [width - len(ids) for ids in prompts]
    tokens = torch.tensor([[pad] * gap + list(ids) for gap, ids in zip(gaps, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=device)
    cache = _prompt_cache(model, prompts, tokens, mask, pad)
    stops = torch.tensor(options.get("eos_token_id", []), device=device)
    sampled: list[list[int]] = [[] for _ in prompts]
    places = torch.arange(len(prompts), device=device)
    left = options["max_new_tokens"]
    while left and len(places):
        steps = left if cache is None else min(left, _STEPS_BETWEEN_LEAVING)
        length = tokens.shape[1]
        tokens = model.generate(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, **{**options, "max_new_tokens": steps}
        )
        new = tokens[:, length:]
        for place, row in zip(places.tolist(), new.tolist(), strict=True):
            sampled[place] += row
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        left -= steps
        going = torch.isin(new, stops).any(1).logical_not().nonzero()[:, 0]
        if cache is not None and len(going) < len(places):
            cache.batch_select_indices(going)
        tokens, mask, places = tokens[going], mask[going], places[going]
    return sampled


def _prompt_cache(
    model: Any, prompts: Sequence[Sequence[int]], tokens: torch.Tensor, mask: torch.Tensor, pad: int
) -> Any:
    """Keys and values of all tokens of the prompts but the last, each prompt computed once; None where there is no
    such cache of this model, or nothing to put into it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if min(len(ids) for ids in prompts) < 2:
        return None
    first: dict[tuple[int, ...], int] = {}
    which = [first.setdefault(tuple(ids), len(first)) for ids in prompts]
    once = torch.tensor([which.index(number) for number in range(len(first))], device=tokens.device)
    cache = model.generate(
        input_ids=tokens[once, :-1],
        attention_mask=mask[once, :-1],
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad,
        return_dict_in_generate=True,
    ).past_key_values
    # Others, of a short window or recurrent, cannot be cut by rows and continued, or not in every version.
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    if cache.get_seq_length() != tokens.shape[1] - 1:  # the adapter puts a prefix of its own before the prompt
        return None
    cache.batch_select_indices(torch.tensor(which, device=tokens.device))
    return cache


def sample_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt | list[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int,
    seed: int,
    renderer: Renderer | None = None,
    progress: bool = True,
    description: str = "sampling",
) -> list[list[str]]:
    """Draw responses from a causal language model: `draw_responses`, the texts alone."""
    drawn = draw_responses(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        renderer=renderer,
        progress=progress,
        description=description,
    )
    return [[draw.text for draw in row] for row in drawn]


class Draw(NamedTuple):
    """A response drawn from a model, and whether it ended by itself and not at max_new_tokens."""

    text: str
    ended: bool


def draw_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt | list[int]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int,
    seed: int,
    renderer: Renderer | None = None,
    progress: bool = True,
    description: str = "sampling",
) -> list[list[Draw]]:
    """Draw responses from a causal language model.

    Args:
        prompts: (X) str or messages, which ``renderer`` writes as the model is to see them, or token ids.
        samples_per_prompt: draws a prompt, independent.
        max_new_tokens: longest response, tokens.
        temperature: 0 is greedy.
        top_p: nucleus mass in (0, 1].
        batch_size: sequences decoded together (a prompt drawn 4 times is 4 sequences).
        renderer: default one of the tokenizer, with its default options.
        seed: the draws depend on it, the prompts and batch_size, on no other use of the random state, which is left as
            it was. Two policies that are compared need different seeds, or their samples are not independent.

    Returns:
        ``[prompt][sample]`` in the order of ``prompts``, special tokens removed.

    Raises:
        ValueError: a prompt is empty, has a token that the model has no embedding of, or leaves no room for
            max_new_tokens in the model's context.
    """
    for name, value in (
        ("samples_per_prompt", samples_per_prompt),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1; got {value}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number >= 0; got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1]; got {top_p}")

    context = getattr(model.config, "max_position_embeddings", None)
    rows = model.get_input_embeddings().weight.shape[0]
    renderer = renderer or Renderer(tokenizer)
    encoded = [
        prompt if isinstance(prompt, list) and isinstance(prompt[0], int) else renderer.prompt_ids(prompt)
        for prompt in prompts
    ]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}]: expected at least one token; got {prompts[index]!r}")
        if (largest := max(ids)) >= rows:
            raise ValueError(
                f"prompts[{index}]: expected tokens among the {rows} rows of the model's embedding; got {largest} "
                f"({tokenizer.convert_ids_to_tokens(largest)!r})"
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompts[{index}]: expected room for max_new_tokens {max_new_tokens} in the model's context of "
                f"{context}; got a prompt of {len(ids)}"
            )

    stop = getattr(model.generation_config, "eos_token_id", None)
    stops = {*(stop if isinstance(stop, list) else [stop]), *renderer.end_ids} - {None}
    pad = next((p for p in (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(stops)) if p is not None), 0)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": pad, "use_cache": True}
    options |= {"eos_token_id": sorted(stops)} if stops else {}
    # The token is drawn by the last processor, which leaves one: generate takes the likeliest.
    options |= {"do_sample": False, "logits_processor": _draws(temperature, top_p)}

    # Longest first: neighbours need little padding, and a batch that does not fit in memory fails at the start.
    by_length = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    rows = [index for index in by_length for _ in range(samples_per_prompt)]
    responses: list[list[Draw]] = [[] for _ in encoded]
    device = model.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _plain_sampling(model), progress_bar(progress) as bar:
        torch.manual_seed(seed)
        task = bar.add_task(description, total=len(rows))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            for index, tokens in zip(batch, _sample_batch(model, [encoded[i] for i in batch], options), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
                responses[index].append(Draw(text, ended=end < len(tokens)))
            bar.advance(task, len(batch))
    return responses
