"""Policies to sample from: a causal language model, its adapters, weighted sums of them, the points of a sweep.

transformers and peft are imported when a policy is loaded, not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopo_kernels.data.rendering import Renderer
from mopo_kernels.text import one_line

# What `mopo train --sweep` writes into its folder: the points, each with an adapter in a folder of its name.
SWEEP_FILE = "sweep.json"


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
            raise ValueError(f"adapter: expected one of the model's adapters {known}; got {adapter!r}")
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
        raise ValueError(f"scale: expected a finite number; got {scale}")
    wanted: dict[str, float] = {}
    if isinstance(adapter, Mapping):
        wanted = {str(folder): float(weight) for folder, weight in adapter.items()}
    elif adapter is not None:
        wanted = {str(adapter): 1.0}
    if adapter is not None and not wanted:
        raise ValueError("adapter: expected at least one folder; got an empty mapping")
    for folder, weight in wanted.items():
        _check_place("adapter", folder)
        if not np.isfinite(weight):
            raise ValueError(f"adapter: expected finite weights; got {weight} for {folder}")
    if is_adapter(source):
        if adapter is not None:
            raise ValueError(f"adapter: expected None, as the model {source} is itself an adapter; got {adapter}")
        wanted, source = {source: 1.0}, _adapter_base(source)
    elif Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"model: expected a model folder (config.json) or an adapter folder (adapter_config.json); got {source}"
        )
    elif scale != 1.0 and not wanted:
        raise ValueError(f"scale: expected 1 without an adapter; got {scale}")
    for folder in wanted:
        if Path(folder).exists() and not (Path(folder) / "adapter_config.json").is_file():
            raise ValueError(f"adapter: expected a folder with an adapter_config.json; got {folder}")
    factors = {folder: scale * weight for folder, weight in wanted.items()}
    name = _policy_name(factors) if factors else one_line(Path(source).name)
    for folder, factor in factors.items():
        if (factor != 1.0 or len(factors) > 1) and (reason := _not_scalable(folder)):
            raise ValueError(
                f"scale: expected 1, and no other adapter, with one that {reason}; got {factor:g} for {folder}"
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
        raise ValueError(f"{path}: expected what mopo train --sweep writes; got other content ({error!r})") from error
    for name in names:
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise ValueError(f"{path}: expected points named by folders within it; got {name!r}")
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
        raise ValueError(f"policy {folder}: expected a sweep with a trained point; got {len(records)} points without")
    return policies


def _check_place(argument: str, place: str) -> None:
    # A hub name has one slash at most: anything else is a folder, and should not be looked for on the network first.
    if (place.count("/") > 1 or place.startswith((".", "~", "/"))) and not Path(place).exists():
        raise ValueError(f"{argument}: expected a folder or a hub name; got {place}, which does not exist")


def _adapter_base(adapter: str) -> str:
    base = _import("peft").PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"adapter {adapter} does not name its base model: give the model and the adapter separately")
    return str(base)


def _same_source(first: str, second: str) -> bool:
    return first == second or (
        Path(first).exists() and Path(second).exists() and Path(first).resolve() == Path(second).resolve()
    )
