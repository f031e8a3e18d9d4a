"""Win rates of one policy over another: sample from both, let judges score the samples, compare with intervals.

A *judge* scores one response to one prompt; a higher score is better. One that also has ``score_batch(prompts,
responses)``, such as ``rewards.RewardModel``, is given many at once. The *win rate* of a candidate over a baseline on
one prompt is the share of (candidate sample, baseline sample) pairs in which the candidate's score is the higher, a tie
counting one half; over prompts it is the mean. It estimates P_k of SPEC section 1 with the baseline in place of mu and
the judge's order in place of p_k. Prompts, not samples, are the independent units, so intervals resample prompts.

transformers and peft are imported when a policy is loaded, not before: scoring responses needs numpy alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mopo_kernels.data.columns import Columns
from mopo_kernels.data.rendering import Renderer
from mopo_kernels.data.schema import (
    TEMPLATE_COLUMNS,
    DataError,
    check_media,
    check_prompt,
    is_given,
    join_context,
)
from mopo_kernels.text import one_line

Prompt = str | list[dict[str, str]]
Judge = Callable[[str, str], float]


@runtime_checkable
class BatchJudge(Protocol):
    """A judge that can be given many responses at once."""

    def __call__(self, prompt: str, response: str) -> float:
        """The score of one response."""

    def score_batch(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """The scores of responses, each to the prompt of its place: what a call gives for each."""


# What `mopo train --sweep` writes into its folder: the points, each with an adapter in a folder of its name.
SWEEP_FILE = "sweep.json"
# Indices drawn at once by the bootstrap: 32 MiB of int64, whatever the number of prompts.
_BOOTSTRAP_BLOCK = 1 << 22
# Tokens sampled before those sequences that have ended leave a batch: each time costs about a tenth of a token's time.
_STEPS_BETWEEN_LEAVING = 4


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often the candidate beats the baseline on one objective.

    objective: its name. mean: win rate in [0, 1], 0.5 = parity. low, high: the bootstrap interval by prompt.
    prompts: number of prompts. samples: number of candidate responses scored. ties: share of pairs with equal scores.
    confidence: level of the interval, in (0, 1).
    """

    objective: str
    mean: float
    low: float
    high: float
    prompts: int
    samples: int
    ties: float = 0.0
    confidence: float = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher one policy's win rate over a baseline is than another's, on the same prompts.

    objective: its name. mean: in [-1, 1], 0 = alike. low, high: the bootstrap interval by prompt, paired. prompts:
    their number. confidence: level of the interval, in (0, 1).
    """

    objective: str
    mean: float
    low: float
    high: float
    prompts: int
    confidence: float = 0.95


@dataclasses.dataclass(frozen=True)
class LengthStatistics:
    """Lengths of a set of responses, in `unit` ("words" or "tokens"); `empty` is the share of zero-length responses."""

    unit: str
    count: int
    mean: float
    median: float
    p90: float
    longest: int
    empty: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_responses` and `compare_policies` measured.

    win_rates: objective -> WinRate of the candidate over the baseline. prompts (X). candidate, baseline: responses,
    [prompt][sample]. candidate_scores, baseline_scores: objective -> per prompt the score of each sample.
    """

    win_rates: dict[str, WinRate]
    prompts: list[Prompt]
    candidate: list[list[str]]
    baseline: list[list[str]]
    candidate_scores: dict[str, list[list[float]]]
    baseline_scores: dict[str, list[list[float]]]
    candidate_length: LengthStatistics
    baseline_length: LengthStatistics

    def mean_score(self, objective: str) -> tuple[float, float]:
        """Mean judge score of the candidate's and of the baseline's responses, in the judge's own unit."""
        means = (
            float(np.mean([np.mean(row) for row in scores[objective]]))
            for scores in (self.candidate_scores, self.baseline_scores)
        )
        candidate, baseline = means
        return candidate, baseline

    def as_dict(self, *, responses: bool = True) -> dict[str, Any]:
        """Plain lists and dicts for JSON; `responses=False` leaves out the texts and the single scores."""
        report: dict[str, Any] = {
            "win_rates": {
                name: dataclasses.asdict(rate)
                | dict(zip(("candidate_mean_score", "baseline_mean_score"), self.mean_score(name), strict=True))
                for name, rate in self.win_rates.items()
            },
            "length": {
                "candidate": dataclasses.asdict(self.candidate_length),
                "baseline": dataclasses.asdict(self.baseline_length),
            },
        }
        if responses:
            report["samples"] = [
                {
                    "prompt": prompt,
                    "candidate": self.candidate[index],
                    "baseline": self.baseline[index],
                    "candidate_scores": {name: rows[index] for name, rows in self.candidate_scores.items()},
                    "baseline_scores": {name: rows[index] for name, rows in self.baseline_scores.items()},
                }
                for index, prompt in enumerate(self.prompts)
            ]
        return report


class _Weights:
    """One model in memory, the peft adapters loaded onto it and what writes its prompts: what several policies
    share."""

    def __init__(self, source: str, model: Any, renderer: Renderer) -> None:
        self.source = source
        self.model = model
        self.renderer = renderer
        self.adapters: dict[str, str] = {}  # folder or hub name -> name inside the PeftModel
        self._scaling: dict[str, list[tuple[dict[str, float], float]]] = {}

    def add_adapter(self, folder: str) -> str:
        """Load the adapter once and return its name inside the PeftModel."""
        if folder not in self.adapters:
            peft = _import("peft")
            name = f"policy_{len(self.adapters)}"
            if self.adapters:
                self.model.load_adapter(folder, adapter_name=name)
            else:
                self.model = peft.PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            self.model.eval()
            self.adapters[folder] = name
        return self.adapters[folder]

    def scaling(self, adapter: str) -> list[tuple[dict[str, float], float]]:
        """Of every layer: the mapping that holds the adapter's factor, by its name inside the PeftModel, and that
        factor as it was saved."""
        if adapter not in self._scaling:
            layers = [module.scaling for module in self.model.modules() if isinstance(module, _lora_layer())]
            self._scaling[adapter] = [(layer, float(layer[adapter])) for layer in layers if adapter in layer]
        return self._scaling[adapter]


def _switch_on(model: Any, names: list[str]) -> None:
    if len(names) == 1:
        model.set_adapter(names[0])
    else:
        model.base_model.set_adapter(names)  # the PeftModel around it takes one name only


def _lora_layer() -> Any:
    _import("peft")
    return importlib.import_module("peft.tuners.lora").LoraLayer


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A causal language model, or a weighted sum of peft adapters on it; several policies may share one set of base
    weights.

    name: for tables and plots. adapters: by the adapter's name inside the shared PeftModel, the factor of its update of
    the weights; empty is the base model, sampled with every adapter switched off.
    """

    name: str
    adapters: Mapping[str, float]
    _weights: _Weights = dataclasses.field(repr=False)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        adapter: str | None = None,
        name: str = "policy",
        chat: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Policy:
        """Wrap a model already in memory. For a PeftModel, `adapter` names the adapter; None is its base model.

        chat, chat_template_kwargs: as for `load_policy`.
        """
        known = list(getattr(model, "peft_config", {}))
        if adapter is not None and adapter not in known:
            raise ValueError(f"adapter must be one of the model's adapters {known}, got {adapter!r}")
        renderer = Renderer(tokenizer, chat, chat_template_kwargs=chat_template_kwargs or {})
        return cls(name, {} if adapter is None else {adapter: 1.0}, _Weights(name, model, renderer))

    @property
    def renderer(self) -> Renderer:
        """What writes prompts as this policy is to see them."""
        return self._weights.renderer

    @property
    def tokenizer(self) -> Any:
        return self._weights.renderer.tokenizer

    @property
    def source(self) -> str:
        """Folder or hub name of the base model."""
        return self._weights.source

    def base(self, name: str = "base") -> Policy:
        """The same weights with every adapter switched off."""
        return Policy(name, {}, self._weights)

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The model with this policy's adapters, and no others, switched on; undone on leaving."""
        model = self._weights.model
        if not hasattr(model, "peft_config"):
            yield model
        elif not self.adapters:
            with model.disable_adapter():
                yield model
        else:
            with self._scaled(), self._switched_on(model):
                yield model

    @contextlib.contextmanager
    def _switched_on(self, model: Any) -> Iterator[None]:
        before, own = list(model.active_adapters), list(self.adapters)
        if before == own:
            yield
            return
        _switch_on(model, own)
        try:
            yield
        finally:
            _switch_on(model, before)

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[None]:
        """Every layer's factor times this policy's, whatever another policy that is active around it has made of it."""
        changes: list[tuple[dict[str, float], str, float]] = []
        for adapter, factor in self.adapters.items():
            for layer, saved in self._weights.scaling(adapter):
                if layer[adapter] != factor * saved:
                    changes.append((layer, adapter, layer[adapter]))
                    layer[adapter] = factor * saved
        try:
            yield
        finally:
            for layer, adapter, before in changes:
                layer[adapter] = before


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{package} is needed here: pip install 'mopo-kernels[train]'") from error


def load_policy(
    model: str | Path,
    adapter: str | Path | Mapping[str, float] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    share: Policy | None = None,
    scale: float = 1.0,
    chat: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Policy:
    """Load a policy for sampling.

    Args:
        model: folder or hub name of a causal language model, or of a peft adapter, whose configuration then names the
            model.
        adapter: folder or hub name of a peft adapter to put on it; or several of them, each with a weight: the policy
            whose weights are the model's plus the weighted sum of the adapters' updates (for weights that sum to 1 the
            rewarded soup of the policies, arXiv 2306.04488). The sum is of the products B A themselves, not of the
            factors. Any finite weight will do, also below 0 or above 1.
        device: default the first CUDA device, else the CPU.
        dtype: default the one stored in the checkpoint, but float32 on the CPU, where half precision is slower.
        share: a policy loaded before; if it stands on the same model, its weights are used again, not loaded twice. An
            adapter that is there already is not loaded again, whatever its scale.
        scale: factor of the update, and of every weight of several: 0 is the model alone, 1 the adapter as it was
            saved.
        chat, chat_template_kwargs: how prompts are written, as for :class:`mopo_kernels.data.rendering.Renderer`; of
            weights used again, what was given with them.

    Raises:
        ValueError: a folder is missing or is neither, a scale comes without an adapter, or a factor other than 1 with
            an adapter whose update is more than a product of LoRA factors (DoRA, trained biases, modules saved whole,
            another method).
        OSError: the checkpoint cannot be read.
    """
    source = str(model)
    _check_place("model", source)
    if not np.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")
    wanted: dict[str, float] = {}
    if isinstance(adapter, Mapping):
        wanted = {str(folder): float(weight) for folder, weight in adapter.items()}
    elif adapter is not None:
        wanted = {str(adapter): 1.0}
    if adapter is not None and not wanted:
        raise ValueError("adapter must name at least one folder, got an empty mapping")
    for folder, weight in wanted.items():
        _check_place("adapter", folder)
        if not np.isfinite(weight):
            raise ValueError(f"adapter must have finite weights, got {weight} for {folder}")
    if is_adapter(source):
        if adapter is not None:
            raise ValueError(f"model {source} is itself an adapter, so adapter must be None, got {adapter}")
        wanted, source = {source: 1.0}, _adapter_base(source)
    elif Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"model must be a model folder (config.json) or an adapter folder (adapter_config.json), got {source}"
        )
    elif scale != 1.0 and not wanted:
        raise ValueError(f"scale must be 1 without an adapter, got {scale}")
    for folder in wanted:
        if Path(folder).exists() and not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"adapter must be a folder with an adapter_config.json, got {folder}")
    factors = {folder: scale * weight for folder, weight in wanted.items()}
    name = _policy_name(factors) if factors else one_line(Path(source).name)
    for folder, factor in factors.items():
        if (factor != 1.0 or len(factors) > 1) and (reason := _not_scalable(folder)):
            raise ValueError(
                f"scale and weights must be 1 for an adapter that {reason}, and it the only one, got {factor:g} for "
                f"{folder}"
            )

    if share is not None and _same_source(share._weights.source, source):
        weights = share._weights
    else:
        transformers = _import("transformers")
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        stored = dtype or (torch.float32 if target.type == "cpu" else "auto")
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=stored, trust_remote_code=False)
            loaded = loaded.to(target).eval()
        except OSError as error:
            raise OSError(f"model {source} could not be loaded: {error}") from error
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        weights = _Weights(source, loaded, Renderer(tokenizer, chat, chat_template_kwargs=chat_template_kwargs or {}))
    return Policy(name, {weights.add_adapter(folder): factor for folder, factor in factors.items() if factor}, weights)


def _policy_name(factors: Mapping[str, float]) -> str:
    """Of its adapters, each with its factor where that is not 1."""
    names = [one_line(Path(folder).name) for folder in factors]
    return " + ".join(
        name if factor == 1.0 else f"{factor:g} {name}" for name, factor in zip(names, factors.values(), strict=True)
    )


def _not_scalable(adapter: str) -> str | None:
    """Why an adapter's update is not a factor times what its layers add, or None."""
    peft = _import("peft")
    config = peft.PeftConfig.from_pretrained(adapter)
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"is no LoRA but {getattr(config.peft_type, 'value', config.peft_type)}"
    for option, reason in (
        ("use_dora", "is a DoRA"),
        ("modules_to_save", "has modules saved whole"),
        ("trainable_token_indices", "has trained tokens"),
        ("alora_invocation_tokens", "acts after its invocation only"),
    ):
        if getattr(config, option, None):
            return reason
    return "has trained biases" if getattr(config, "bias", "none") != "none" else None


def is_adapter(folder: str | Path) -> bool:
    """Whether a local folder holds a peft adapter and not a whole model."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def is_sweep(folder: str | Path) -> bool:
    """Whether a folder holds a sweep: adapters on one model, trained under several thresholds."""
    return (Path(folder) / SWEEP_FILE).is_file()


def read_sweep(folder: str | Path) -> dict[str, Any]:
    """The report of a sweep.

    Raises ValueError where the file is none, or a point's name leads out of the folder.
    """
    path = Path(folder) / SWEEP_FILE
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        names = [str(point["name"]) for point in report["points"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be what mopo train --sweep writes, got other content ({error!r})") from error
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ValueError(f"{path} must name points by folders within it, got {name!r}")
    return report


def load_sweep_policies(
    folder: str | Path, *, device: str | torch.device | None = None, **options: Any
) -> list[Policy]:
    """The trained points of a sweep, by their names, on one model in memory; device and options as for `load_policy`.

    Raises ValueError where no point is trained.
    """
    records = read_sweep(folder)["points"]
    policies: list[Policy] = []
    for record in records:
        if record["status"] == "trained":
            share = policies[0] if policies else None
            policies.append(load_policy(Path(folder) / record["name"], device=device, share=share, **options))
    if not policies:
        raise ValueError(f"policy {folder} must be a sweep with a trained point, got {len(records)} points without")
    return policies


def _check_place(argument: str, place: str) -> None:
    # A hub name has one slash at most: anything else is a folder, and should not be looked for on the network first.
    if (place.count("/") > 1 or place.startswith((".", "~", "/"))) and not Path(place).exists():
        raise ValueError(f"{argument} must be a folder or a hub name, got {place}, which does not exist")


def _adapter_base(adapter: str) -> str:
    base = _import("peft").PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"adapter {adapter} does not name its base model: give the model and the adapter separately")
    return str(base)


def _same_source(first: str, second: str) -> bool:
    return first == second or (
        Path(first).exists() and Path(second).exists() and Path(first).resolve() == Path(second).resolve()
    )


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the response to follow, as ``data.rendering.Renderer`` has them by default.

    Raises ValueError for messages without a chat template, and DataError for a prompt that the template refuses.
    """
    return Renderer(tokenizer).prompt_ids(prompt)


def prompt_text(prompt: Prompt) -> str:
    """What a judge sees of a prompt: the str itself, or the last user message."""
    if isinstance(prompt, str):
        return prompt
    users = [message["content"] for message in prompt if message["role"] == "user"]
    if not users:
        raise ValueError(f"prompt must hold a message with role 'user', got roles {[m['role'] for m in prompt]}")
    return users[-1]


def progress_bar(enabled: bool) -> Progress:
    """On stderr; shows nothing unless enabled."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not enabled,
    )


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
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")

    context = getattr(model.config, "max_position_embeddings", None)
    rows = model.get_input_embeddings().weight.shape[0]
    renderer = renderer or Renderer(tokenizer)
    encoded = [
        prompt if isinstance(prompt, list) and isinstance(prompt[0], int) else renderer.prompt_ids(prompt)
        for prompt in prompts
    ]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}] must have at least one token, got {prompts[index]!r}")
        if (largest := max(ids)) >= rows:
            raise ValueError(
                f"prompts[{index}] has token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's "
                f"embedding {rows} rows"
            )
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompts[{index}] has {len(ids)} tokens: with max_new_tokens {max_new_tokens} that exceeds the "
                f"model's context of {context}"
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


def load_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from a .jsonl file (one object a line, its prompt a str or messages) or a .txt file (one a line).

    The prompt of an object may have the other names that ``load_preferences`` finds; "system" and "history" become
    messages of it, tools and images are refused, and other columns are named in the log. Blank lines are passed over.
    Raises ValueError with file and line for anything else, or for a file with no prompt.
    """
    from mopo_kernels.data.sources import read_text_rows

    path = Path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"prompts must be a .jsonl or .txt file, got {path}")
    if path.suffix == ".jsonl":
        names = Columns({})
        prompts = [_row_prompt(row.record, f"{path}:{row.line}", names) for row in read_text_rows(path)]
        names.report(str(path))
    else:
        try:
            # Not splitlines, which takes characters inside a text for ends of lines, too.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid UTF-8: {error.reason} at byte {error.start + 1}") from None
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, got none")
    return prompts


def _row_prompt(record: Any, where: str, names: Columns) -> Prompt:
    """The prompt of a row with what else it has of the conversation."""
    try:
        if isinstance(record, DataError):
            raise DataError(record.problem, field=record.field)
        if not isinstance(record, Mapping):
            raise DataError(f"expected an object, got {type(record).__name__}")
        check_media(record)
        for name in TEMPLATE_COLUMNS:
            if is_given(record.get(name)):
                raise DataError("expected none, as sampling does not use it; got some", field=name)
        row, _ = names.find_prompt(names.standard(record)[0])
        names.count_unused(row, ("prompt",))
        return join_context(check_prompt(row.get("prompt")), row)
    except DataError as error:
        # A file of prompts has no mapping of columns.
        raise ValueError(f"{where}: {str(error).partition(': pass columns=')[0]}") from None


def load_judges(spec: str) -> dict[str, Judge]:
    """The judges a spec points to.

    spec: "package.module:ATTR", looked up among what is installed and then from the current folder, or
    "path/to/file.py:ATTR"; ATTR is a dict from objective to judge. What it imports may lie beside it. Raises ValueError
    where any part of that is missing or of another kind.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon or not place or not attribute:
        raise ValueError(f'judges must be "package.module:ATTR" or "path/to/file.py:ATTR", got {spec!r}')
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    if not hasattr(module, attribute):
        raise ValueError(f"judges {spec!r}: {place} has no attribute {attribute!r}")
    judges = getattr(module, attribute)
    if not isinstance(judges, dict) or not judges:
        raise ValueError(f"judges {spec!r}: {attribute} must be a non-empty dict of name -> callable, got {judges!r}")
    for name, judge in judges.items():
        if not isinstance(name, str) or not callable(judge):
            raise ValueError(f"judges {spec!r}: every entry must be str -> callable, got {name!r}: {judge!r}")
        if not name.isprintable():
            raise ValueError(f"judges {spec!r}: names must be of printable characters, got {name!r}")
    return dict(judges)


@contextlib.contextmanager
def _import_from(folder: str) -> Iterator[None]:
    if folder in sys.path:
        yield
        return
    # Last, so that a file beside a judge never stands in for a module that is installed.
    sys.path.append(folder)
    try:
        yield
    finally:
        # The imported module may have changed sys.path itself, so the entry is found by value, not by place.
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"judges: no file {path}")
    spec = importlib.util.spec_from_file_location(f"_mopo_judges_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None  # both are always there for a .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    with _import_from(str(path.resolve().parent)):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"judges: {path} failed to import: {type(error).__name__}: {error}") from error
    return module


def _module_by_name(name: str) -> Any:
    with _import_from(str(Path.cwd())):
        try:
            return importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"judges: module {name!r} failed to import: {type(error).__name__}: {error}") from error


def judge_responses(
    judges: Mapping[str, Judge],
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    *,
    progress: bool = True,
    description: str = "judging",
) -> dict[str, list[list[float]]]:
    """Score every response with every judge: objective -> [prompt][sample].

    Raises ValueError for a score that is not a finite number, naming judge and prompt, and for a `BatchJudge` that
    gives another number of scores.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"responses must have one list a prompt: expected {len(prompts)}, got {len(responses)}")
    asked = [prompt_text(prompt) for prompt, drawn in zip(prompts, responses, strict=True) for _ in drawn]
    answers = [response for drawn in responses for response in drawn]
    scores: dict[str, list[list[float]]] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task(description, total=len(answers) * len(judges))
        for name, judge in judges.items():
            if isinstance(judge, BatchJudge):
                values = judge.score_batch(asked, answers)
                if len(values) != len(answers):
                    raise ValueError(f"judge {name!r} must give {len(answers)} scores, got {len(values)}")
                bar.advance(task, len(answers))
            else:
                values = []
                for text, response in zip(asked, answers, strict=True):
                    values.append(judge(text, response))
                    bar.advance(task)
            rest = iter(values)
            scores[name] = [[float(next(rest)) for _ in drawn] for drawn in responses]
            for index, row in enumerate(scores[name]):
                if not np.isfinite(row).all():
                    raise ValueError(f"judge {name!r} must give finite scores, got {row} for prompts[{index}]")
    return scores


def _check_bootstrap(prompts: int, n_boot: int, confidence: float) -> None:
    if prompts < 2:
        raise ValueError(f"prompts must be at least 2 for an interval by prompt, got {prompts}")
    if n_boot < 1:
        raise ValueError(f"n_boot must be at least 1, got {n_boot}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def win_rate_by_prompt(
    candidate_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    baseline_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    name: str = "candidate_scores",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Win rate of the candidate over the baseline on each prompt, and the share of ties, both (X,).

    candidate_scores, baseline_scores: [prompt][sample], as for `win_rate`. name: of the candidate's scores, in
    messages. Raises ValueError as `win_rate` does.
    """
    if len(candidate_scores) != len(baseline_scores):
        raise ValueError(
            f"baseline_scores must have as many prompts as {name}, {len(candidate_scores)}, got {len(baseline_scores)}"
        )
    by_prompt, tied = np.empty(len(candidate_scores)), np.empty(len(candidate_scores))
    for index in range(len(candidate_scores)):
        candidate = np.asarray(candidate_scores[index], dtype=np.float64)
        baseline = np.asarray(baseline_scores[index], dtype=np.float64)
        for argument, scores in ((name, candidate), ("baseline_scores", baseline)):
            if scores.ndim != 1 or scores.size == 0 or not np.isfinite(scores).all():
                raise ValueError(
                    f"{argument}[{index}] must be a non-empty list of finite numbers, got {scores.tolist()}"
                )
        sign = np.sign(candidate[:, None] - baseline[None, :])
        by_prompt[index] = (1.0 + sign.mean()) / 2.0
        tied[index] = (sign == 0.0).mean()
    return by_prompt, tied


def win_rate(
    candidate_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    baseline_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    objective: str = "",
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """Win rate of the candidate over the baseline, with a percentile bootstrap interval by prompt.

    candidate_scores, baseline_scores: [prompt][sample], the judge's scores; prompts correspond, the numbers of samples
    may differ. Per prompt all pairs count 1, 1/2 or 0; the mean over prompts is unbiased for independent samples:
    eq. (29) of docs/method.md.
    n_boot: resamples of the prompts. The percentile interval is a little short for few prompts (below about 30), and
    has no width when every prompt has the same win rate.
    Raises ValueError for fewer than 2 prompts, which allow no interval, and for unequal numbers of prompts.
    """
    by_prompt, tied = win_rate_by_prompt(candidate_scores, baseline_scores)
    prompts = len(by_prompt)
    _check_bootstrap(prompts, n_boot, confidence)
    low, high = _interval(by_prompt, n_boot, confidence, seed)
    return WinRate(
        objective=objective,
        mean=float(by_prompt.mean()),
        low=low,
        high=high,
        prompts=prompts,
        samples=sum(len(row) for row in candidate_scores),
        ties=float(tied.mean()),
        confidence=confidence,
    )


def win_rate_difference(
    candidate_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    rival_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    baseline_scores: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    objective: str = "",
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The candidate's win rate over the baseline minus the rival's, paired by prompt.

    What a prompt adds to both cancels, so the interval is shorter than those of the two win rates suggest.

    candidate_scores, rival_scores, baseline_scores: [prompt][sample], as for `win_rate`, of the same prompts. n_boot:
    resamples of the prompts, on which both win rates are taken. Raises ValueError as `win_rate` does.
    """
    prompts = len(baseline_scores)
    rows = []
    for name, scores in (("candidate_scores", candidate_scores), ("rival_scores", rival_scores)):
        if len(scores) != prompts:
            raise ValueError(f"{name} must have as many prompts as baseline_scores, {prompts}, got {len(scores)}")
        rows.append(win_rate_by_prompt(scores, baseline_scores, name=name)[0])
    _check_bootstrap(prompts, n_boot, confidence)
    low, high = _interval(rows[0] - rows[1], n_boot, confidence, seed)
    return Difference(objective, float((rows[0] - rows[1]).mean()), low, high, prompts, confidence)


def _interval(by_prompt: NDArray[np.float64], n_boot: int, confidence: float, seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean over prompts."""
    prompts = len(by_prompt)
    rng = np.random.default_rng(seed)
    block = max(1, _BOOTSTRAP_BLOCK // prompts)
    means = np.concatenate(
        [
            by_prompt[rng.integers(prompts, size=(min(block, n_boot - start), prompts))].mean(axis=1)
            for start in range(0, n_boot, block)
        ]
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def length_statistics(responses: Sequence[Sequence[str]], tokenizer: Any = None) -> LengthStatistics:
    """Lengths of [prompt][sample] responses: in tokens with a tokenizer (no special tokens), else in words."""
    texts = [text for drawn in responses for text in drawn]
    if not texts:
        raise ValueError("responses must hold at least one response, got none")
    if tokenizer is None:
        lengths = np.array([len(text.split()) for text in texts])
    else:
        lengths = np.array([len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])
    return LengthStatistics(
        unit="words" if tokenizer is None else "tokens",
        count=len(texts),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        p90=float(np.quantile(lengths, 0.9)),
        longest=int(lengths.max()),
        empty=float((lengths == 0).mean()),
    )


def compare_responses(
    prompts: Sequence[Prompt],
    candidate: Sequence[Sequence[str]],
    baseline: Sequence[Sequence[str]],
    judges: Mapping[str, Judge],
    *,
    baseline_scores: dict[str, list[list[float]]] | None = None,
    tokenizer: Any = None,
    n_boot: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Judge responses already drawn, [prompt][sample], and compare them on every objective.

    baseline_scores: of the judges, where they are known: one set of baseline responses may serve several comparisons.
    tokenizer: for lengths in tokens, else they are in words. seed: of the bootstrap, the same resamples of prompts for
    every objective.
    """
    judge = functools.partial(judge_responses, judges, prompts, progress=progress)
    candidate_scores = judge(candidate, description="judging the candidate")
    if baseline_scores is None:
        baseline_scores = judge(baseline, description="judging the baseline")
    return Comparison(
        win_rates={
            name: win_rate(
                candidate_scores[name],
                baseline_scores[name],
                objective=name,
                n_boot=n_boot,
                confidence=confidence,
                seed=seed,
            )
            for name in judges
        },
        prompts=list(prompts),
        candidate=[list(drawn) for drawn in candidate],
        baseline=[list(drawn) for drawn in baseline],
        candidate_scores=candidate_scores,
        baseline_scores=baseline_scores,
        candidate_length=length_statistics(candidate, tokenizer),
        baseline_length=length_statistics(baseline, tokenizer),
    )


def compare_policies(
    candidate: Policy,
    baseline: Policy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    *,
    samples_per_prompt: int = 4,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    progress: bool = True,
) -> Comparison:
    """Sample from both policies, judge the samples, report the candidate's win rate over the baseline by objective.

    The options are those of `sample_responses` and `win_rate`. The two policies are sampled with different seeds, both
    derived from `seed`, so that their samples are independent. Lengths are in the candidate's tokens.
    """
    return compare_with_baseline(
        [candidate],
        baseline,
        prompts,
        judges,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        n_boot=n_boot,
        confidence=confidence,
        progress=progress,
    )[0]


def compare_with_baseline(
    candidates: Sequence[Policy],
    baseline: Policy,
    prompts: Sequence[Prompt],
    judges: Mapping[str, Judge],
    *,
    samples_per_prompt: int = 4,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    n_boot: int = 2000,
    confidence: float = 0.95,
    progress: bool = True,
) -> list[Comparison]:
    """`compare_policies` of each candidate with one baseline, which is sampled and judged once.

    The candidates are sampled with the same seed: each is compared with the baseline alone, and common random numbers
    take noise out of the differences between them.
    """
    _check_bootstrap(len(prompts), n_boot, confidence)  # here too, before the samples are paid for
    ours, theirs = (int(state) for state in np.random.SeedSequence(seed).generate_state(2))

    def draw(role: str, policy: Policy, state: int) -> list[list[str]]:
        with policy.active() as model:
            return sample_responses(
                model,
                policy.tokenizer,
                prompts,
                samples_per_prompt=samples_per_prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                batch_size=batch_size,
                seed=state,
                renderer=policy.renderer,
                progress=progress,
                description=f"sampling the {role} ({policy.name})",
            )

    drawn = [draw("candidate", candidate, ours) for candidate in candidates]
    against = draw("baseline", baseline, theirs)
    comparisons: list[Comparison] = []
    for candidate, responses in zip(candidates, drawn, strict=True):
        comparisons.append(
            compare_responses(
                prompts,
                responses,
                against,
                judges,
                baseline_scores=comparisons[0].baseline_scores if comparisons else None,
                tokenizer=candidate.tokenizer,
                n_boot=n_boot,
                confidence=confidence,
                seed=seed,
                progress=progress,
            )
        )
    return comparisons
