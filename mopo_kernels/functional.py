"""The public functions. They put their arguments into bundles, check them, choose a backend and call one custom op.

Dimension letters: N tokens, H hidden, V vocabulary, S sequences, P pairs, K objectives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mopo_kernels import backends, checks, naive
from mopo_kernels.arguments import HeadInputs, HeadOptions, LogitTransform, LossOptions, PairBatch
from mopo_kernels.fused import linear_logprob as fused_logprob
from mopo_kernels.fused import linear_mopo_loss as fused_loss
from mopo_kernels.fused import mopo_loss as pair_loss
from mopo_kernels.fused.buffer_plan import accumulation_dtype, buffer_bytes
from mopo_kernels.fused.vocab_parallel import sharded_head
from mopo_kernels.transfer import to_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MOPOLossOutput(NamedTuple):
    """What a batch's loss call returns. Only ``loss`` is differentiable.

    Attributes:
        loss: (), the loss.
        log_ratio: (S,), ``r_s = l_s - l0_s`` in nats (per token with ``length``).
        margin: (P,), ``h_p = r_i - r_j`` in nats.
        satisfaction: (K,), the measured value of each objective on the scale of the estimator, NaN without a label.
        labelled: (K,), the weight behind each satisfaction: batches merge as
            ``sum(satisfaction * labelled) / sum(labelled)``, leaving out objectives whose ``labelled`` is 0.
        effective_sample_size: (), ``(sum w)^2 / sum w^2`` of the weights in use: the frozen ratio for "cloning" and
            "closed_form", the importance weights ``exp(r_s)`` otherwise.
    """

    loss: Tensor
    log_ratio: Tensor
    margin: Tensor
    satisfaction: Tensor
    labelled: Tensor
    effective_sample_size: Tensor


def _check_options(options: HeadOptions, inputs: HeadInputs) -> None:
    options.check(inputs.weight.shape[0])
    device = inputs.weight.device
    checks.expect(
        options.gradient_filter is None or device.type == "cpu",
        "gradient_filter",
        f"None on {device.type}, where no kernel has it yet",
        options.gradient_filter,
    )


def _group_name(process_group: ProcessGroup | None, backend: str) -> str | None:
    if process_group is None:
        return None
    checks.expect(hasattr(process_group, "group_name"), "process_group", "a process group", repr(process_group))
    checks.expect(backend != "naive", "process_group", 'None with backend "naive"', "a group")
    name: str = process_group.group_name
    return name


def _reference_inputs(
    inputs: HeadInputs, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> HeadInputs:
    """The reference's rows and head, checked: what is not given is the policy's, but its bias only along with its
    weight."""
    checks.dimensions("ref_hidden", ref_hidden, "(N, H')")
    vocabulary = inputs.weight.shape[0]
    if ref_weight is not None:
        checks.dimensions("ref_weight", ref_weight, "(V, H')")
        checks.shape("ref_weight", ref_weight, (vocabulary, ref_hidden.shape[1]), "(V, H')")
    else:
        ref_weight, ref_bias = inputs.weight, inputs.bias if ref_bias is None else ref_bias
    ref_inputs = HeadInputs(ref_hidden, ref_weight, inputs.target, ref_bias).autocast()
    checks.dtype("ref_hidden", ref_inputs.hidden, checks.FLOATING)
    checks.device("ref_hidden", ref_hidden, inputs.hidden.device)
    checks.shape("ref_hidden", ref_hidden, (inputs.hidden.shape[0], ref_weight.shape[1]), "(N, H')")
    ref_inputs.check_head(vocabulary, "H'", prefix="ref_")
    return ref_inputs


def _check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    checks.dtype("cu_seqlens", cu_seqlens, (torch.int64, torch.int32))
    checks.dimensions("cu_seqlens", cu_seqlens, "(S + 1,)")
    checks.expect(cu_seqlens.shape[0] >= 1, "cu_seqlens", "shape (S + 1,)", tuple(cu_seqlens.shape))
    checks.device("cu_seqlens", cu_seqlens, hidden.device, host=True)


def _normalizer(normalizer: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The normalizer as a tensor ()."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        checks.expect(normalizer.numel() == 1, "normalizer", "one element", tuple(normalizer.shape))
        checks.device("normalizer", normalizer, device)
        checks.real("normalizer", normalizer)
        return normalizer.detach().reshape(())
    checks.normalizer(normalizer)
    return torch.full((), normalizer, dtype=dtype, device=device)


def _token_logprob(inputs: HeadInputs, options: HeadOptions) -> Tensor:
    """Log-probabilities (N,) of checked arguments."""
    if options.backend == "naive":
        if not torch.compiler.is_compiling():
            checks.targets(inputs.target, inputs.weight.shape[0], options.ignore_index)
        return naive.linear_logprob(
            inputs.hidden,
            inputs.weight,
            inputs.target,
            inputs.bias,
            ignore_index=options.ignore_index,
            **options.transform.keywords(),
        )
    checks.reverse_mode(hidden=inputs.hidden, weight=inputs.weight, bias=inputs.bias)
    logprob: Tensor = fused_logprob.linear_logprob(
        *fused_logprob.LinearLogprob(inputs.with_needs(), options).flatten()
    )[0]
    return logprob


def _segment_sum(token_logprob: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    """Sums (S,) of checked arguments."""
    cu_seqlens = to_device(cu_seqlens, token_logprob.device)
    if backend == "naive":
        if not torch.compiler.is_compiling():
            checks.cu_seqlens(cu_seqlens, token_logprob.shape[0])
        return naive.segment_sum(token_logprob, cu_seqlens)
    result: Tensor = pair_loss.segment_sum(token_logprob, cu_seqlens, backend)
    return result


def _mopo_loss(logprob: Tensor, ref_logprob: Tensor, batch: PairBatch) -> MOPOLossOutput:
    """The loss of checked arguments, in the dtype of ``ref_logprob``."""
    checks.reverse_mode(logprob=logprob)
    backend = backends.resolve("auto", logprob.device)
    arguments = pair_loss.MOPOLoss(logprob.to(ref_logprob.dtype), ref_logprob, batch, backend)
    return MOPOLossOutput(*pair_loss.mopo_loss(*arguments.flatten())[:6])


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
    gradient_filter: float | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each target token under a linear head, without materialising the logits.

    Replaces ``log_softmax(z, -1).gather(-1, target[..., None])[..., 0]`` with
    ``z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`` (no tanh if ``softcap`` is
    None), 0 where ``target == ignore_index``. Differentiable in hidden, weight and bias for any upstream gradient, also
    under ``torch.vmap``; but for "naive" not twice, not in forward mode, and not by ``torch.func``.

    With the head frozen (neither weight nor bias requires grad) forward and backward cost two products of N x V x H
    (on a GPU in half precision three, where the logits of 32 rows do not fit ``max_buffer_bytes``); with a trained head
    three while the logits of the batch fit three quarters of it, else four; without gradients one. Ignored rows are
    dropped before any product on the CPU; on an accelerator, for which nothing waits, pack them away first
    (:func:`pack_responses`).

    Args:
        hidden: (..., H) floating, last hidden states.
        weight: (V, H), the head, same dtype and device as hidden (under autocast any floating dtype).
        target: (...) int64, in 0 .. V - 1 or ``ignore_index``, not shifted: ``hidden[t]`` predicts ``target[t]``.
        bias: (V,) or None.
        ignore_index: the target that marks a token as not scored.
        softcap: cap of Gemma 2's tanh, in logits, 1e-10 to 1e5, or None.
        logit_scale: factor on the products, e.g. Cohere's, at most 1e10 in size.
        temperature: divisor of the logits, 1e-10 to 1e10.
        backend: "auto", "naive" (the unchunked oracle), "torch", "cpp", "triton" or "cuda"; only "auto" falls back.
        max_buffer_bytes: bound on the memory beyond inputs, outputs and gradients, in bytes; default 256 MiB, on a GPU
            what 4096 rows of logits take if that is more. A few dozen bytes a token come on top, and with "triton" in
            half precision a copy of a weight whose rows are not contiguous. With "naive" it has no effect.
        gradient_filter: None for exact gradients, or the share of the largest element that may be left out of them,
            e.g. 2^-12, on the CPU ("gradient filtering" of cut cross-entropy, arXiv:2411.09009). A model's
            distributions are peaked: nearly all of ``d logprob / d logits`` is nothing beside the rest. With rows of
            coefficient ``g_t`` (the upstream gradient; 1 with a frozen head), 128 at a time, only the vocabulary
            entries v are multiplied for which ``|g_t| p_tv`` of one of these rows reaches this share of the largest
            ``|g|`` of the chunk; targets always are. A row of dweight then lacks what the small probabilities of its
            entry would have added: a rare token is still pushed up where it is the target, but no longer pushed down
            where nothing expects it. Log-probabilities are exact. Of three products with a trained head two become
            small, of two with a frozen one one. Where more than half of the vocabulary would be kept, or what is kept
            has less than half of the probability (looked at where a tile spans the vocabulary, on one rank), the
            gradient is exact, at the usual cost. With "naive" it has no effect.
        process_group: ranks that each hold some rows of one head: weight (W, H) and bias (W,) are this rank's, W may
            differ, and rank after rank they are the V rows. Every rank passes the same hidden and target, whose ids are
            those of the whole vocabulary, and gets the same log-probabilities and the whole gradient for hidden. All
            ranks must make the call, with the same options; it waits for the device and the other ranks once, to
            exchange sizes. Products are not kept for backward: four with a trained head. A weight (and bias) that is a
            ``DTensor`` (V, H), placed ``(Shard(0),)`` over a mesh of one dimension, names its group itself: None will
            do, and the gradients are ``DTensor`` of the same placement.

    Returns:
        (...) log-probabilities in nats, fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape, dtype, device or value is wrong; the message names the argument.
        BackendUnavailableError: the named backend cannot run here; a RuntimeError.
        NotImplementedError: forward-mode AD, or a gradient of ``torch.func``.
    """
    checks.tensors(hidden=hidden, weight=weight, target=target)
    checks.optional_tensors(bias=bias)
    checks.expect(hidden.dim() >= 1 and hidden.shape[-1] > 0, "hidden", "shape (..., H)", tuple(hidden.shape))
    checks.shape("target", target, tuple(hidden.shape[:-1]), "(...)" if hidden.dim() != 2 else "(N,)")
    weight, bias, process_group = sharded_head(weight, bias, process_group, "")
    inputs = HeadInputs(hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1), bias).autocast()
    inputs.check()
    transform = LogitTransform(softcap, logit_scale, temperature)
    backend = backends.resolve(backend, hidden.device)
    group_name = _group_name(process_group, backend)
    options = HeadOptions(ignore_index, transform, backend, max_buffer_bytes, gradient_filter, group_name)
    _check_options(options, inputs)
    return _token_logprob(inputs, options).view(target.shape)


def linear_sequence_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
    gradient_filter: float | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each packed sequence: :func:`linear_logprob` summed over its scored tokens.

    Args:
        hidden: (N, H), the rows of all sequences, one after the other.
        target: (N,) int64.
        cu_seqlens: (S + 1,) int64 or int32, from 0 to N, not decreasing: sequence s has rows
            ``cu_seqlens[s] .. cu_seqlens[s + 1]``. An empty sequence has log-probability 0. On hidden's device or on
            the CPU.
        weight, bias and the options: as in :func:`linear_logprob`, with its errors and costs.

    Returns:
        (S,) log-probabilities in nats, fp32 (fp64 for fp64 input).
    """
    checks.tensors(hidden=hidden, weight=weight, target=target, cu_seqlens=cu_seqlens)
    checks.optional_tensors(bias=bias)
    checks.dimensions("hidden", hidden, "(N, H)")
    _check_cu_seqlens(cu_seqlens, hidden)
    weight, bias, process_group = sharded_head(weight, bias, process_group, "")
    inputs = HeadInputs(hidden, weight, target, bias).autocast()
    inputs.check()
    transform = LogitTransform(softcap, logit_scale, temperature)
    backend = backends.resolve(backend, hidden.device)
    group_name = _group_name(process_group, backend)
    options = HeadOptions(ignore_index, transform, backend, max_buffer_bytes, gradient_filter, group_name)
    _check_options(options, inputs)
    return _segment_sum(_token_logprob(inputs, options), cu_seqlens, backend)


def mopo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    pairs: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    *,
    tau: float = 0.1,
    loss_type: str = "regression",
    pair_weight: Tensor | None = None,
    label_rate: Tensor | None = None,
    margin: Tensor | None = None,
    length: Tensor | None = None,
    prompt_index: Tensor | None = None,
    max_ratio: float | None = None,
    estimator: str = "pair",
    normalizer: float | Tensor | None = None,
) -> MOPOLossOutput:
    """The constrained preference loss of sequence log-probabilities, and how well each objective is met.

    With ``r = logprob - ref_logprob``, ``h = r_i - r_j`` for the pair (i, j), labels ``z`` and multipliers ``w``:

    * "regression": ``sum_p a_p (h_p - T_p)^2 / sum_p a_p``, ``T_p = (1 / tau) sum_k w_k (z_pk - 1/2)``; IPO if K = 1;
    * "cloning": ``- sum_s rho_s l_s / S`` with the frozen ratio ``rho = n softmax(sum_k w_k sbar_k / tau)`` among the n
      responses of a prompt (arXiv 2505.10892, Eq. 7). With 0/1 labels and few responses a prompt rho is biased;
    * "sigmoid": ``- sum_p a_p sum_k w_k [z log sig(u) + (1 - z) log sig(-u)] / sum_p a_p``, ``u = tau h - margin``: DPO
      (tau is its beta) if K = 1, linear scalarisation with fixed weights, MODPO with a margin.

    Args:
        logprob: (S,) policy log-probabilities in nats, fp32 or fp64 (half precision is computed in fp32).
        ref_logprob: (S,) reference log-probabilities, finite (checked on the CPU), a constant.
        pairs: (P, 2) int64, rows (i, j) of two responses to the same prompt.
        preference: (P, K), P(i beats j) for each objective in [0, 1]; 0.5 a tie, NaN no label. A missing label is left
            out of "sigmoid", "cloning" and ``satisfaction``. To the target T_p of "regression" it contributes 0, as a
            tie does: NaN and 0.5 give the same loss, a pair without any label is drawn to margin 0, and the policy
            stays nearer to the reference than w and tau say. ``label_rate`` makes up for that.
        objective_weight: (K,), 1 for the primary objective and the multipliers (>= 0) of the others.
        tau: strength of the KL regularisation, on the scale of preferences, 1e-10 to 1e10; beta of "sigmoid".
        pair_weight: (P,) >= 0, default 1. "cloning" does not weigh labels by it, "satisfaction" does.
        label_rate: (K,) in (0, 1], the share of pairs labelled for each objective: labels that exist count 1 / rate, so
            that T_p is right on average if labels are missing at random or each pair is labelled for one objective
            only. Not for "cloning".
        margin: (P,), for "sigmoid" only.
        length: (S,) tokens: use log-probabilities per token.
        prompt_index: (S,) int: which prompt each response answers; needed by "cloning" and "closed_form". Where given,
            the two responses of a pair must answer the same prompt.
        max_ratio: cap on the frozen ratio, at least 1.
        estimator: how ``satisfaction`` is measured. "pair": how often the policy, choosing between the two responses by
            its own ratio, picks the preferred one: bounded, low variance, 0.5 at the reference, but not the win rate
            P_k, so its thresholds are on its own scale. "snis": win rate by self-normalised importance weights,
            consistent when the reference wrote the data; log-ratios beyond 60 nats either way count as 60.
            "closed_form": the value of the frozen ratio on the labels; ratios below ``exp(-300)`` count as that.
        normalizer: divide by this in place of the batch's own ``sum_p a_p`` (or S for "cloning"): the total over
            micro-batches and ranks makes accumulation and data parallelism exact. 0 counts as 1, like the weight of a
            batch without pairs.

    Returns:
        :class:`MOPOLossOutput`. A batch without pairs has loss 0 and zero gradients, but with "cloning", whose frozen
        ratio is then 1.

    Raises:
        ValueError: a shape, dtype, device or value is wrong; the message names the argument. All but logprob are
            constants: preference, weights, margin and length must not require grad. Weights, margins, lengths and the
            normalizer beyond 1e10, and divisors below 1e-10, are wrong as well: fp32 would make NaN of them.
        NotImplementedError: forward-mode AD, or a gradient of ``torch.func``.
    """
    checks.tensors(logprob=logprob, ref_logprob=ref_logprob)
    checks.dimensions("logprob", logprob, "(S,)")
    checks.dtype("logprob", logprob, checks.FLOATING)
    checks.shape("ref_logprob", ref_logprob, tuple(logprob.shape), "(S,)")
    checks.dtype("ref_logprob", ref_logprob, checks.FLOATING)
    checks.device("ref_logprob", ref_logprob, logprob.device)
    dtype = accumulation_dtype(logprob.dtype)
    batch = PairBatch(
        pairs,
        preference,
        objective_weight,
        pair_weight,
        label_rate,
        margin,
        length,
        prompt_index,
        _normalizer(normalizer, dtype, logprob.device),
        LossOptions(tau, loss_type, max_ratio, estimator),
    )
    batch.check(logprob.shape[0], logprob.device)
    return _mopo_loss(logprob, ref_logprob.detach().to(dtype), batch)


def linear_mopo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    pairs: Tensor,
    preference: Tensor,
    objective_weight: Tensor,
    bias: Tensor | None = None,
    *,
    ref_logprob: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    tau: float = 0.1,
    loss_type: str = "regression",
    pair_weight: Tensor | None = None,
    label_rate: Tensor | None = None,
    margin: Tensor | None = None,
    length: Tensor | None = None,
    prompt_index: Tensor | None = None,
    max_ratio: float | None = None,
    estimator: str = "pair",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
    gradient_filter: float | None = None,
    process_group: ProcessGroup | None = None,
) -> MOPOLossOutput:
    """The constrained preference loss straight from hidden states, in one pass: logits are never materialised.

    Replaces :func:`mopo_loss` of :func:`linear_sequence_logprob`, with the same numbers and fewer products: forward
    computes the gradients for hidden, weight and bias as well (three products in all with a trained head, two with a
    frozen one, one without gradients), and ``loss.backward()`` only scales them by the upstream factor. The gradients
    are those of ``loss`` alone. Responses tied together by pairs that need more rows than the buffer holds are
    recomputed: one more product for their rows, the same numbers.

    Args:
        hidden, weight, target, cu_seqlens, bias: the packed policy batch, as in :func:`linear_sequence_logprob`.
        pairs, preference, objective_weight: as in :func:`mopo_loss`, rows being sequences; what a missing label does,
            and what ``label_rate`` does about it, is said there. Where ``cu_seqlens`` and ``pairs`` are both on the
            CPU, whatever the device of the rest, the chunks are planned so that pairs close in them. On an accelerator
            without that, all pairs must close in one chunk, or every row is recomputed.
        ref_logprob: (S,) reference log-probabilities in nats; or else
        ref_hidden: (N, H') the reference's hidden states for the same rows, with
        ref_weight: (V, H'), default ``weight``, and
        ref_bias: (V,), default ``bias`` if ``ref_weight`` is not given, otherwise none. Constants, all of them.
        The options: as in :func:`mopo_loss` and :func:`linear_logprob`.

    Returns:
        :class:`MOPOLossOutput`, in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: a shape, dtype, device or value is wrong; the message names the argument.
        BackendUnavailableError: the named backend cannot run here; a RuntimeError.
        NotImplementedError: forward-mode AD, or a gradient of ``torch.func``.
    """
    checks.tensors(hidden=hidden, weight=weight, target=target, cu_seqlens=cu_seqlens)
    checks.optional_tensors(
        bias=bias, ref_logprob=ref_logprob, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
    )
    checks.dimensions("hidden", hidden, "(N, H)")
    weight, bias, process_group = sharded_head(weight, bias, process_group, "")
    if ref_weight is not None:
        ref_weight, ref_bias, ref_group = sharded_head(ref_weight, ref_bias, process_group, "ref_")
        checks.expect(ref_group is process_group, "ref_weight", "a tensor cut over the ranks as weight is", "a DTensor")
    inputs = HeadInputs(hidden, weight, target, bias).autocast()
    inputs.check()
    _check_cu_seqlens(cu_seqlens, hidden)
    transform = LogitTransform(softcap, logit_scale, temperature)
    backend = backends.resolve(backend, hidden.device)
    group_name = _group_name(process_group, backend)
    options = HeadOptions(ignore_index, transform, backend, max_buffer_bytes, gradient_filter, group_name)
    _check_options(options, inputs)
    checks.optional_tensors(length=length, prompt_index=prompt_index)
    checks.per_sequence(cu_seqlens, hidden.shape[0], ref_logprob=ref_logprob, length=length, prompt_index=prompt_index)
    dtype = accumulation_dtype(inputs.hidden.dtype)
    batch = PairBatch(
        pairs,
        preference,
        objective_weight,
        pair_weight,
        label_rate,
        margin,
        length,
        prompt_index,
        _normalizer(normalizer, dtype, hidden.device),
        LossOptions(tau, loss_type, max_ratio, estimator),
    )
    batch.check(cu_seqlens.shape[0] - 1, hidden.device, host_pairs=True)
    checks.expect(
        (ref_logprob is None) != (ref_hidden is None),
        "ref_logprob and ref_hidden",
        "one without the other",
        "neither" if ref_logprob is None else "both",
    )
    shared_hidden = None
    if ref_hidden is None:
        for argument, tensor in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            checks.expect(tensor is None, argument, "None without ref_hidden", "a tensor")
    else:
        ref_inputs = _reference_inputs(inputs, ref_hidden, ref_weight, ref_bias)
        shared = ref_inputs.weight is inputs.weight and ref_inputs.bias is inputs.bias
        if shared and options.backend != "naive":
            shared_hidden = ref_inputs.hidden.detach()
        else:
            ref_options = replace(options, max_buffer_bytes=buffer_bytes(options, inputs.weight))
            with torch.no_grad():
                ref_logprob = _segment_sum(_token_logprob(ref_inputs, ref_options), cu_seqlens, backend)
    if ref_logprob is not None:
        checks.dtype("ref_logprob", ref_logprob, checks.FLOATING)
        checks.device("ref_logprob", ref_logprob, hidden.device)
        ref_logprob = ref_logprob.detach().to(dtype)

    if options.backend == "naive":
        assert ref_logprob is not None
        logprob = _segment_sum(_token_logprob(inputs, options), cu_seqlens, backend)
        return _mopo_loss(logprob, ref_logprob, replace(batch, pairs=to_device(pairs, hidden.device)))
    checks.reverse_mode(hidden=inputs.hidden, weight=inputs.weight, bias=inputs.bias)
    call = fused_loss.LinearMOPOLoss(inputs.with_needs(), cu_seqlens, ref_logprob, shared_hidden, batch, options)
    return MOPOLossOutput(*fused_loss.linear_mopo_loss(*call.flatten())[:6])


def pack_responses(hidden: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """From padded causal-LM tensors to packed scored rows.

    Shifts by one (``hidden[:, t]`` predicts ``labels[:, t + 1]``) and keeps the rows whose label is scored: prompt and
    padding never reach a product. Differentiable in hidden. The number of rows depends on the labels: with labels on an
    accelerator this waits for all that was launched there, with labels on the CPU for nothing.

    Args:
        hidden: (B, T, H) last hidden states.
        labels: (B, T) int64, ``ignore_index`` on prompt and padding. On hidden's device or on the CPU.

    Returns:
        hidden (N, H) and target (N,) int64 on hidden's device, cu_seqlens (B + 1,) int64 where the labels are; a row
        without a scored token is an empty sequence.

    Raises:
        ValueError: a shape, dtype or device is wrong.
    """
    checks.tensors(hidden=hidden, labels=labels)
    checks.ignore_index(ignore_index)
    checks.dimensions("hidden", hidden, "(B, T, H)")
    checks.dtype("hidden", hidden, checks.FLOATING)
    checks.dtype("labels", labels, (torch.int64,))
    checks.shape("labels", labels, tuple(hidden.shape[:2]), "(B, T)")
    checks.device("labels", labels, hidden.device, host=True)
    shifted = labels[:, 1:]
    scored = shifted != ignore_index
    cu_seqlens = torch.zeros(labels.shape[0] + 1, dtype=torch.int64, device=labels.device)
    cu_seqlens[1:] = scored.sum(dim=1).cumsum(0)
    row, position = scored.nonzero(as_tuple=True)
    target = to_device(shifted[row, position], hidden.device)
    return hidden[to_device(row, hidden.device), to_device(position, hidden.device)], target, cu_seqlens
