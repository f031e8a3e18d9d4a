"""The arguments of a call in bundles: each names its options once, checks itself once and is handed down whole.

A public function takes keywords one by one, puts them into a bundle, lets it check itself, and passes nothing else on.
Where the bundle meets a custom op, which takes numbers, strings and tensors only, the op's schema and the way there and
back follow from the bundle's fields (:class:`OpArguments`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor

from mopo_kernels import checks
from mopo_kernels.naive import ESTIMATORS, LOSS_TYPES
from mopo_kernels.transfer import to_device

# How a schema writes the types of fields.
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
}
T = TypeVar("T", bound="OpArguments")


class OpArguments:
    """A frozen dataclass whose fields, and those of the bundles among them, are arguments of a custom op, in order;
    :func:`bundle` sets what follows."""

    #: The arguments' names, in order, and their types as a schema writes them.
    NAMES: ClassVar[tuple[str, ...]]
    TYPES: ClassVar[tuple[str, ...]]
    #: Where they are: their names after those of the bundles that hold them.
    PATHS: ClassVar[tuple[str, ...]]
    # Of each field its name, its class if it is a bundle, and how many arguments it stands for.
    _FIELDS: ClassVar[tuple[tuple[str, type[OpArguments] | None, int], ...]]
    _VALUES: ClassVar[Any]

    @classmethod
    def schema(cls) -> str:
        """The arguments as a schema has them, without brackets."""
        return ", ".join(f"{kind} {name}" for kind, name in zip(cls.TYPES, cls.NAMES, strict=True))

    def flatten(self) -> tuple[Any, ...]:
        """The arguments' values, in order."""
        values: tuple[Any, ...] = self._VALUES(self)
        return values

    @classmethod
    def unflatten(cls: type[T], values: Sequence[Any]) -> T:
        """The bundle of values that :meth:`flatten` gave."""
        # Not by __init__, which is slow where a dataclass is frozen: a small call takes a few hundred microseconds.
        self, start = object.__new__(cls), 0
        fields = self.__dict__
        for name, kind, count in cls._FIELDS:
            fields[name] = values[start] if kind is None else kind.unflatten(values[start : start + count])
            start += count
        return self

    def keywords(self) -> dict[str, Any]:
        """The values by name."""
        return dict(zip(self.NAMES, self.flatten(), strict=True))

    @classmethod
    def gradients(cls, **by_name: Tensor | None) -> tuple[Tensor | None, ...]:
        """What a backward returns: a gradient or None for each argument."""
        return tuple(map(by_name.get, cls.NAMES))


def bundle(cls: type[T]) -> type[T]:
    """Finds the arguments of a dataclass that derives from :class:`OpArguments`."""
    hints = get_type_hints(cls)
    fields: list[tuple[str, type[OpArguments] | None, int]] = []
    paths: list[str] = []
    types: list[str] = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind = hints[field.name]
        if isinstance(kind, type) and issubclass(kind, OpArguments):
            fields.append((field.name, kind, len(kind.PATHS)))
            paths += [f"{field.name}.{path}" for path in kind.PATHS]
            types += kind.TYPES
        else:
            fields.append((field.name, None, 1))
            paths.append(field.name)
            types.append(_SCHEMA_TYPES[kind])
    cls.NAMES, cls.TYPES = tuple(path.rpartition(".")[2] for path in paths), tuple(types)
    cls.PATHS, cls._FIELDS = tuple(paths), tuple(fields)
    # Written out, as dataclasses do it: a loop is slow, and torch.compile does not take operator.attrgetter.
    source = f"lambda self: ({' '.join(f'self.{path},' for path in paths)})"
    cls._VALUES = staticmethod(eval(source))
    return cls


@bundle
@dataclass(frozen=True)
class LogitTransform(OpArguments):
    """From products to logits: ``z = softcap * tanh(logit_scale * (product + bias) / softcap) / temperature``."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def check(self) -> None:
        if self.softcap is not None:
            checks.within("softcap", self.softcap, checks.SMALLEST, checks.LARGEST_SOFTCAP)
        checks.within("logit_scale", self.logit_scale, -checks.LARGEST, checks.LARGEST)
        checks.within("temperature", self.temperature, checks.SMALLEST, checks.LARGEST)

    def slope(self, logit: Tensor) -> Tensor:
        """``dz/dproduct`` at logits z, in eq. (33) of docs/method.md."""
        slope = torch.full_like(logit, self.logit_scale / self.temperature)
        if self.softcap is not None:
            slope *= 1 - (logit * (self.temperature / self.softcap)) ** 2
        return slope


@bundle
@dataclass(frozen=True)
class HeadOptions(OpArguments):
    """The options of :func:`mopo_kernels.linear_logprob`; ``process_group`` by name."""

    ignore_index: int = -100
    transform: LogitTransform = LogitTransform()
    backend: str = "auto"
    max_buffer_bytes: int | None = None
    gradient_filter: float | None = None
    process_group: str | None = None

    def check(self, vocabulary: int = 0) -> None:
        """``vocabulary``: how many ids ``ignore_index`` must not be one of."""
        self.transform.check()
        limit = self.max_buffer_bytes
        if limit is not None:
            checks.integer("max_buffer_bytes", limit)
            checks.expect(limit > 0, "max_buffer_bytes", "a positive number", limit)
            checks.expect(limit < 2**63, "max_buffer_bytes", "a number of 64 bits", limit)
        share = self.gradient_filter
        if share is not None:
            checks.number("gradient_filter", share)
            checks.expect(0 < share < 1, "gradient_filter", "None or a number between 0 and 1", share)
        checks.ignore_index(self.ignore_index, vocabulary)


@bundle
@dataclass(frozen=True)
class HeadInputs(OpArguments):
    """Rows and the head that they go through: hidden (N, H), weight (V, H), target (N,), bias (V,) or None, and for
    which of them gradients are wanted."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        return self.need_hidden, self.need_weight, self.need_bias

    @property
    def frozen(self) -> bool:
        """A gradient for hidden alone."""
        return self.needs == (True, False, False)

    @property
    def trained(self) -> bool:
        return self.need_weight or self.need_bias

    def autocast(self) -> HeadInputs:
        """Under autocast the head runs in autocast's dtype, as ``F.linear`` does; fp64 is left alone, as there."""
        kind = self.hidden.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind) or self.hidden.dtype == torch.float64:
            return self
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        return HeadInputs(self.hidden.to(dtype), self.weight.to(dtype), self.target, bias)

    def check(self) -> None:
        """hidden (N, H), weight (V, H), bias (V,), one floating dtype, one device; target (N,) int64."""
        hidden, weight = self.hidden, self.weight
        checks.plain("hidden", hidden)
        checks.dtype("hidden", hidden, checks.FLOATING)
        checks.dimensions("weight", weight, "(V, H)")
        checks.expect(weight.shape[0] > 0, "weight", "at least one row", tuple(weight.shape))
        checks.columns("weight", weight, hidden.shape[1])
        self.check_head(weight.shape[0], "H")
        checks.dtype("target", self.target, (torch.int64,))
        checks.shape("target", self.target, (hidden.shape[0],), "(N,)")
        checks.device("target", self.target, hidden.device)

    def check_head(self, vocabulary: int, letter: str, prefix: str = "") -> None:
        """The parts of the head fit each other; ``letter`` names the hidden size, ``prefix`` begins the names."""
        checks.plain(f"{prefix}weight", self.weight)
        checks.shape(f"{prefix}weight", self.weight, (vocabulary, self.hidden.shape[1]), f"(V, {letter})")
        checks.dtype(f"{prefix}weight", self.weight, (self.hidden.dtype,))
        checks.device(f"{prefix}weight", self.weight, self.hidden.device)
        if self.bias is not None:
            checks.shape(f"{prefix}bias", self.bias, (vocabulary,), "(V,)")
            checks.dtype(f"{prefix}bias", self.bias, (self.hidden.dtype,))
            checks.device(f"{prefix}bias", self.bias, self.hidden.device)

    def with_needs(self) -> HeadInputs:
        """The same, and for which of them autograd wants gradients."""
        needs = (checks.requires_grad(tensor) for tensor in (self.hidden, self.weight, self.bias))
        return HeadInputs(self.hidden, self.weight, self.target, self.bias, *needs)


@bundle
@dataclass(frozen=True)
class LossOptions(OpArguments):
    """The options of :func:`mopo_kernels.mopo_loss` that are no tensors."""

    tau: float = 0.1
    loss_type: str = "regression"
    max_ratio: float | None = None
    estimator: str = "pair"

    def check(self) -> None:
        checks.choice("loss_type", self.loss_type, LOSS_TYPES)
        checks.choice("estimator", self.estimator, ESTIMATORS)
        checks.within("tau", self.tau, checks.SMALLEST, checks.LARGEST)
        if self.max_ratio is not None:
            # Where labels favour no response the ratio is 1: a smaller cap would bind even there.
            checks.within("max_ratio", self.max_ratio, 1, checks.LARGEST)


def _between(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda t: (t >= low) & (t <= high)


@bundle
@dataclass(frozen=True)
class PairBatch(OpArguments):
    """What the loss needs besides log-probabilities: see :func:`mopo_kernels.mopo_loss`."""

    pairs: Tensor
    preference: Tensor
    objective_weight: Tensor
    pair_weight: Tensor | None = None
    label_rate: Tensor | None = None
    margin: Tensor | None = None
    length: Tensor | None = None
    prompt_index: Tensor | None = None
    normalizer: Tensor | None = None
    options: LossOptions = LossOptions()

    def check(self, sequences: int, device: torch.device, host_pairs: bool = False) -> None:
        """Everything but values; ``host_pairs``: pairs may be on the CPU."""
        self.options.check()
        pairs, preference, objective_weight = self.pairs, self.preference, self.objective_weight
        checks.tensors(pairs=pairs, preference=preference, objective_weight=objective_weight)
        checks.optional_tensors(
            pair_weight=self.pair_weight,
            label_rate=self.label_rate,
            margin=self.margin,
            length=self.length,
            prompt_index=self.prompt_index,
        )
        checks.dtype("pairs", pairs, (torch.int64,))
        checks.dimensions("pairs", pairs, "(P, 2)")
        count = pairs.shape[0]
        checks.shape("pairs", pairs, (count, 2), "(P, 2)")
        checks.dimensions("preference", preference, "(P, K)")
        objectives = preference.shape[1]
        checks.shape("preference", preference, (count, objectives), "(P, K)")
        checks.shape("objective_weight", objective_weight, (objectives,), "(K,)")
        expected: tuple[tuple[str, Tensor | None, int, str], ...] = (
            ("pair_weight", self.pair_weight, count, "(P,)"),
            ("label_rate", self.label_rate, objectives, "(K,)"),
            ("margin", self.margin, count, "(P,)"),
            ("length", self.length, sequences, "(S,)"),
            ("prompt_index", self.prompt_index, sequences, "(S,)"),
        )
        for name, tensor, size, letters in expected:
            if tensor is not None:
                checks.shape(name, tensor, (size,), letters)
                checks.device(name, tensor, device)
                checks.real(name, tensor)
                checks.constant(name, tensor)
        checks.device("pairs", pairs, device, host=host_pairs)
        for name, tensor in (("preference", preference), ("objective_weight", objective_weight)):
            checks.device(name, tensor, device)
            checks.dtype(name, tensor, checks.FLOATING)
            checks.constant(name, tensor)
        loss_type = self.options.loss_type
        if self.margin is not None:
            checks.expect(loss_type == "sigmoid", "margin", 'None unless loss_type is "sigmoid"', f"{loss_type!r}")
        if self.label_rate is not None:
            checks.expect(loss_type != "cloning", "label_rate", 'None with loss_type "cloning"', "a tensor")
        if loss_type == "cloning" or self.options.estimator == "closed_form":
            reason = 'a tensor for loss_type "cloning" and estimator "closed_form"'
            checks.expect(self.prompt_index is not None, "prompt_index", reason, "None")
        if self.prompt_index is not None:
            checks.dtype("prompt_index", self.prompt_index, (torch.int64, torch.int32))

    def check_values(self, sequences: int) -> None:
        pairs, prompt = self.pairs, self.prompt_index
        smallest, largest = checks.SMALLEST, checks.LARGEST
        checks.value("pairs", pairs, lambda t: (t >= 0) & (t < sequences), f"a number in 0 .. S - 1 = {sequences - 1}")
        checks.value("pairs", pairs, lambda t: (t[:, :1] != t[:, 1:]).expand_as(t), "two different responses")
        if prompt is not None:
            checks.value(
                "pairs",
                pairs,
                lambda t: (prompt[t[:, :1]] == prompt[t[:, 1:]]).expand_as(t),
                "responses to one prompt, as prompt_index has it",
            )
        checks.value(
            "preference", self.preference, lambda t: torch.isnan(t) | ((t >= 0) & (t <= 1)), "a number in [0, 1] or NaN"
        )
        for name, tensor, low, high, words in (
            ("objective_weight", self.objective_weight, 0.0, largest, f"a number in 0 .. {largest:g}"),
            ("pair_weight", self.pair_weight, 0.0, largest, f"a number in 0 .. {largest:g}"),
            ("label_rate", self.label_rate, smallest, 1.0, f"a number in {smallest:g} .. 1"),
            ("margin", self.margin, -largest, largest, f"a number in {-largest:g} .. {largest:g}"),
            ("length", self.length, smallest, largest, f"a number in {smallest:g} .. {largest:g}"),
        ):
            if tensor is not None:
                checks.value(name, tensor, _between(low, high), words)
        if self.normalizer is not None:
            checks.value(
                "normalizer",
                self.normalizer.reshape(1),
                lambda t: (t == 0) | ((t >= smallest) & (t <= largest)),
                f"0 or a number in {smallest:g} .. {largest:g}",
            )

    def to(self, dtype: torch.dtype, device: torch.device) -> PairBatch:
        """``pairs`` on the device, and all other tensors but ``prompt_index`` in ``dtype``."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return PairBatch(
            to_device(self.pairs, device),
            self.preference.to(dtype),
            self.objective_weight.to(dtype),
            cast(self.pair_weight),
            cast(self.label_rate),
            cast(self.margin),
            cast(self.length),
            self.prompt_index,
            cast(self.normalizer),
            self.options,
        )


@dataclass(frozen=True)
class CallValues:
    """Arguments of an op whose values must be right, each part only where the op has it: targets (N,), ids of a
    ``vocabulary`` or ``ignore_index``; cu_seqlens (S + 1,) of N ``tokens``; the pairs of S ``sequences``."""

    target: Tensor | None = None
    vocabulary: int = 0
    ignore_index: int = 0
    cu_seqlens: Tensor | None = None
    tokens: int = 0
    batch: PairBatch | None = None
    sequences: int = 0

    def check(self) -> None:
        if self.target is not None:
            checks.targets(self.target, self.vocabulary, self.ignore_index)
        if self.cu_seqlens is not None:
            checks.cu_seqlens(self.cu_seqlens, self.tokens)
        if self.batch is not None:
            self.batch.check_values(self.sequences)
