"""What is compared: one preference batch, and each way of getting its loss and gradients.

Every implementation does the same work: policy forward and backward, reference log-probabilities from reference hidden
states, the regression loss with K objectives. ``bare products`` is the floor: the matrix products alone. A peer that
cannot express that loss runs its own on the same rows; then ``Implementation.loss`` says which, and plain PyTorch with
that loss is what its result is held against. An implementation that cannot run here stays in the registry, with the
reason.

One unit is one N x V x H product over the scored rows; "all rows" implementations multiply prompts and padding as well.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mopo_kernels import backends, linear_mopo_loss, naive, pack_responses

TAU = 0.1
BARE = "bare products"
# Buffers of implementations that take a size: this library's default.
BUFFER_BYTES = 256 << 20


@dataclass(frozen=True)
class Workload:
    """4 pairs x 2 responses x ``length`` tokens by default, ``prompt_share`` of them prompt."""

    hidden: int = 1024
    vocabulary: int = 50304
    prompts: int = 4
    length: int = 256
    prompt_share: float = 0.5
    objectives: int = 2
    trained: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def scored(self) -> int:
        """Scored tokens N."""
        return 2 * self.prompts * (self.length - int(self.length * self.prompt_share))

    @property
    def units(self) -> int:
        """Products of N x V x H that the work takes at least: policy 3 (head trained) or 2, reference 1."""
        return 4 if self.trained else 3


@dataclass
class Inputs:
    """A batch of a workload, fresh for a seed. ``hidden`` (B, T, H) requires grad, ``weight`` (V, H) if trained."""

    hidden: Tensor
    ref_hidden: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    preference: Tensor
    objective_weight: Tensor

    @classmethod
    def make(cls, work: Workload, seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        rows = 2 * work.prompts
        prompt = int(work.length * work.prompt_share)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).mul_(work.hidden**-0.25).to(work.dtype)

        labels = torch.randint(0, work.vocabulary, (rows, work.length + 1), generator=g)
        labels[:, : prompt + 1] = -100
        return cls(
            hidden=normal(rows, work.length + 1, work.hidden).requires_grad_(),
            ref_hidden=normal(rows, work.length + 1, work.hidden),
            weight=normal(work.vocabulary, work.hidden).requires_grad_(work.trained),
            labels=labels,
            pairs=torch.arange(rows).view(-1, 2),
            preference=torch.randint(0, 2, (work.prompts, work.objectives), generator=g).float(),
            objective_weight=torch.ones(work.objectives),
        )

    def in_fp32(self) -> Inputs:
        """The same numbers in fp32, as leaves of their own."""
        cast = {
            name: getattr(self, name).detach().float().requires_grad_(getattr(self, name).requires_grad)
            for name in ("hidden", "ref_hidden", "weight")
        }
        return replace(self, **cast)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


Result = tuple[Tensor, ...]


def always() -> str | None:
    """Needs nothing."""
    return None


@dataclass(frozen=True)
class Implementation:
    """A way of doing the work.

    Attributes:
        run: inputs -> loss and the gradients of ``inputs.leaves()``.
        expected: plain PyTorch for the same loss, with which ``run`` must agree; None for the bare products.
        loss: the name of the loss.
        unavailable: why it cannot run here, None if it can. Imports what the implementation needs.
    """

    run: Callable[[Inputs], Result]
    expected: Callable[[Inputs], Result] | None
    loss: str = "regression"
    unavailable: Callable[[], str | None] = always


# -------------------------------------------------------------------------------------------------------- plain PyTorch


def _loss(x: Inputs, logprob: Tensor, ref_logprob: Tensor) -> Result:
    loss = naive.mopo_loss(logprob, ref_logprob, x.pairs, x.preference, x.objective_weight, tau=TAU).loss
    return loss, *torch.autograd.grad(loss, x.leaves())


def policy_and_reference(x: Inputs, logprob: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (S,) of the policy and, without a graph, of the reference: from hidden (B, T, H) each."""
    with torch.no_grad():
        ref_logprob = logprob(x.ref_hidden)
    return logprob(x.hidden), ref_logprob


def on_scored_rows(x: Inputs, token_logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Result:
    """The work by way of ``token_logprob(rows (N, H), weight, target (N,)) -> (N,)``."""

    def logprob(hidden: Tensor) -> Tensor:
        rows, target, cu_seqlens = pack_responses(hidden, x.labels)
        return naive.segment_sum(token_logprob(rows, x.weight, target).float(), cu_seqlens)

    return _loss(x, *policy_and_reference(x, logprob))


def _on_all_rows(x: Inputs, token_logprob: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Result:
    """As :func:`on_scored_rows` with every row, prompts and padding included; what is not scored is dropped after."""
    target = x.labels[:, 1:]
    scored = target != -100
    flat = target.where(scored, 0).flatten()

    def logprob(hidden: Tensor) -> Tensor:
        picked = token_logprob(hidden[:, :-1].flatten(0, 1), x.weight, flat)
        return (picked.float().view_as(target) * scored).sum(dim=1)

    return _loss(x, *policy_and_reference(x, logprob))


def _plain_logprob(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = (rows @ weight.T).float()
    return logits.log_softmax(dim=-1).gather(-1, target[:, None])[:, 0]


def plain(x: Inputs) -> Result:
    """Logits of every row, prompts and padding included. Units: policy 3 (frozen 2), reference 1, over all rows."""
    return _on_all_rows(x, _plain_logprob)


def plain_compacted(x: Inputs) -> Result:
    """Logits of the scored rows only. Units: policy 3 (frozen 2), reference 1."""
    return on_scored_rows(x, _plain_logprob)


def plain_dpo(x: Inputs) -> Result:
    """DPO on the scored rows, the first response of every pair preferred: what Liger's results are held against."""

    def logprob(hidden: Tensor) -> Tensor:
        rows, target, cu_seqlens = pack_responses(hidden, x.labels)
        return naive.segment_sum(_plain_logprob(rows, x.weight, target), cu_seqlens)

    policy, ref = policy_and_reference(x, logprob)
    h = (policy - ref)[x.pairs]
    loss = -F.logsigmoid(TAU * (h[:, 0] - h[:, 1])).mean()
    return loss, *torch.autograd.grad(loss, x.leaves())


@functools.cache
def _compiled_logprob() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    compiled: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(_plain_logprob)
    return compiled


def plain_compiled(x: Inputs) -> Result:
    """As :func:`plain_compacted`, the log-probabilities under ``torch.compile``. Same units."""
    return on_scored_rows(x, _compiled_logprob())


def no_compiler() -> str | None:
    """torch.compile builds C++ on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler; {compiler} is not there"


def bare(x: Inputs) -> Result:
    """The products alone, over the scored rows, in the inputs' dtype: reference, policy, dhidden and, if the head is
    trained, dweight. Units: 4 (frozen 3)."""
    with torch.no_grad():
        rows, ref_rows = (pack_responses(h, x.labels)[0] for h in (x.hidden, x.ref_hidden))
        logits = ref_rows @ x.weight.T
        torch.mm(rows, x.weight.T, out=logits)
        dhidden = logits @ x.weight
        return (dhidden, logits.T @ rows) if x.weight.requires_grad else (dhidden,)


# --------------------------------------------------------------------------------------------------------- this library


def fused(backend: str) -> Callable[[Inputs], Result]:
    """This library's one-pass loss. Units: policy 3 (frozen 2), reference 1."""

    def run(x: Inputs) -> Result:
        rows, target, cu_seqlens = pack_responses(x.hidden, x.labels)
        ref_rows = pack_responses(x.ref_hidden, x.labels)[0]
        loss = linear_mopo_loss(
            rows,
            x.weight,
            target,
            cu_seqlens,
            x.pairs,
            x.preference,
            x.objective_weight,
            ref_hidden=ref_rows,
            tau=TAU,
            backend=backend,
        ).loss
        return loss, *torch.autograd.grad(loss, x.leaves())

    return run


def _no_backend(name: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        try:
            backends.resolve(name, torch.device("cpu"))
        except RuntimeError as error:
            return str(error)
        return None

    return reason


# ---------------------------------------------------------------------------------------------------------------- peers


@functools.cache
def import_error(module: str) -> str | None:
    """None if ``module`` can be imported, else one line that says why not, whatever its import ran into."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


def _needs(*modules: str) -> Callable[[], str | None]:
    return lambda: next((reason for module in modules if (reason := import_error(module))), None)


def _trl(rows: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities (N,) of TRL's function with the settings of its own trainers."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs = ChunkedLogProbFunction.apply(
        rows, weight, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )
    return outputs[0]


def trl(x: Inputs) -> Result:
    """TRL's ``ChunkedLogProbFunction`` given the scored rows, as its trainers give them on a GPU. Units: policy 4
    (frozen 3; backward recomputes the products), reference 1."""
    return on_scored_rows(x, _trl)


def trl_all_rows(x: Inputs) -> Result:
    """TRL's function given every row, as its trainers do on a CPU. Units: as :func:`trl`, over all rows."""
    return _on_all_rows(x, _trl)


def _linear_cross_entropy(rows: Tensor, weight: Tensor, target: Tensor, batch_chunk_size: int | None) -> Tensor:
    # Either a size, or "auto", which picks one.
    method = "auto" if batch_chunk_size is None else None
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size, chunking_method=method)
    return -F.linear_cross_entropy(rows, weight, target, reduction="none", options=options)


def linear_cross_entropy(x: Inputs) -> Result:
    """``F.linear_cross_entropy(reduction="none")`` on the scored rows, chunked as PyTorch chooses. Units: policy 4
    (frozen 3; backward recomputes the products), reference 1. Log-probabilities come back in the inputs' dtype."""
    return on_scored_rows(x, functools.partial(_linear_cross_entropy, batch_chunk_size=None))


def linear_cross_entropy_large(x: Inputs) -> Result:
    """As :func:`linear_cross_entropy` with as many rows a chunk as have fp32 logits of 256 MiB, this library's buffer:
    PyTorch's own choice for a large vocabulary is a few rows."""
    rows = max(1, BUFFER_BYTES // (4 * x.weight.shape[0]))
    return on_scored_rows(x, functools.partial(_linear_cross_entropy, batch_chunk_size=rows))


def _no_linear_cross_entropy() -> str | None:
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return f"torch {torch.__version__} has no chunked F.linear_cross_entropy; 2.13 has"


def _liger_dpo(x: Inputs, hidden: Tensor, ref_hidden: Tensor, target: Tensor, compiled: bool) -> Result:
    """Liger's DPO of (B, T, H) rows and (B, T) targets; it wants every chosen response before every rejected one."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    order = x.pairs.T.flatten()
    loss, *_ = LigerFusedLinearDPOLoss(beta=TAU, compiled=compiled)(
        x.weight, hidden[order], target[order], ref_input=ref_hidden[order], ref_weight=x.weight.detach()
    )
    return loss, *torch.autograd.grad(loss, x.leaves())


def liger_all_rows(x: Inputs) -> Result:
    """Liger's chunked DPO (its chunked preference losses have no regression and no K objectives), a pair a chunk as by
    default, given every row, not compiled. Units: policy 3 (frozen 2), reference 1, over all rows."""
    return _liger_dpo(x, x.hidden[:, :-1], x.ref_hidden[:, :-1], x.labels[:, 1:], compiled=False)


def liger(compiled: bool) -> Callable[[Inputs], Result]:
    """As :func:`liger_all_rows` given responses without their prompts, padded to the longest: it takes no packed rows.
    ``compiled`` is its default. Units: policy 3 (frozen 2), reference 1, over those rows."""

    def run(x: Inputs) -> Result:
        rows, target, cu_seqlens = pack_responses(x.hidden, x.labels)
        ref_rows = pack_responses(x.ref_hidden, x.labels)[0]
        lengths = cu_seqlens.diff().tolist()
        hidden, ref_hidden = (pad_sequence(r.split(lengths), batch_first=True) for r in (rows, ref_rows))
        padded = pad_sequence(target.split(lengths), batch_first=True, padding_value=-100)
        return _liger_dpo(x, hidden, ref_hidden, padded, compiled)

    return run


def _not_here(module: str, reason: str) -> Callable[[], str | None]:
    return lambda: f"{reason} ({import_error(module) or 'installed'})"


def _cannot_run(x: Inputs) -> Any:
    raise NotImplementedError("this implementation has nothing to run on the CPU")


IMPLEMENTATIONS: dict[str, Implementation] = {
    BARE: Implementation(bare, None, loss="none"),
    **{
        f"mopo_kernels {name}": Implementation(fused(name), plain_compacted, unavailable=_no_backend(name))
        for name in backends.availability()
        if name != "naive"
    },
    "plain PyTorch, scored rows": Implementation(plain_compacted, plain_compacted),
    "plain PyTorch, scored rows, compiled": Implementation(plain_compiled, plain_compacted, unavailable=no_compiler),
    "plain PyTorch, all rows": Implementation(plain, plain_compacted),
    "TRL ChunkedLogProb, scored rows": Implementation(trl, plain_compacted, unavailable=_needs("trl.trainer.utils")),
    "TRL ChunkedLogProb, all rows": Implementation(
        trl_all_rows, plain_compacted, unavailable=_needs("trl.trainer.utils")
    ),
    "F.linear_cross_entropy, chunks auto": Implementation(
        linear_cross_entropy, plain_compacted, unavailable=_no_linear_cross_entropy
    ),
    "F.linear_cross_entropy, chunks 256 MiB": Implementation(
        linear_cross_entropy_large, plain_compacted, unavailable=_no_linear_cross_entropy
    ),
    "Liger DPO, scored rows": Implementation(liger(False), plain_dpo, "DPO", _needs("liger_kernel.chunked_loss")),
    "Liger DPO, scored rows, compiled": Implementation(
        liger(True), plain_dpo, "DPO", lambda: import_error("liger_kernel.chunked_loss") or no_compiler()
    ),
    "Liger DPO, all rows": Implementation(liger_all_rows, plain_dpo, "DPO", _needs("liger_kernel.chunked_loss")),
    "cut-cross-entropy": Implementation(
        _cannot_run,
        plain_compacted,
        unavailable=_not_here(
            "cut_cross_entropy",
            "its kernels need a CUDA device; on a CPU it would compile the plain logits, as another entry does",
        ),
    ),
    "QuACK": Implementation(
        _cannot_run,
        plain_compacted,
        unavailable=_not_here(
            "quack", "it needs a Hopper GPU or newer, and reduces to a mean or a sum: no loss of sequences"
        ),
    ),
}


def available(names: tuple[str, ...] = ()) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Implementations that can run here, the bare products first, and the others' reasons; of those whose name contains
    one of ``names``, if any are given (the bare products, which are the unit of time, always).

    Raises:
        ValueError: nothing is called like one of ``names``.
    """
    for part in names:
        if not any(part in name for name in IMPLEMENTATIONS):
            raise ValueError(f"no implementation is called like {part!r}; there are {', '.join(IMPLEMENTATIONS)}")
    chosen = {
        name: implementation
        for name, implementation in IMPLEMENTATIONS.items()
        if name == BARE or not names or any(part in name for part in names)
    }
    reasons = {name: implementation.unavailable() for name, implementation in chosen.items()}
    return (
        {name: implementation for name, implementation in chosen.items() if reasons[name] is None},
        {name: reason for name, reason in reasons.items() if reason is not None},
    )
