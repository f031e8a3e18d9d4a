"""The driver: chunking, compaction, coefficients and accumulation, once for every backend.

Rows are scored tokens; ignored ones are dropped before any product. A chunk of rows goes through

    products (R, W) -> fold: log-sum-exp and target logit -> g -> gradient in place -> dhidden, dweight, dbias

where the backend does ``fold`` and ``gradient_`` and everything else is here. A tile spans the whole vocabulary (W = V)
whenever the buffer holds enough such rows, so that no product is done twice; otherwise the vocabulary is tiled too and
the gradient recomputes its products. Accumulation is in fp32 (fp64 for fp64 input), in a fixed order, with one cast at
the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mopo_kernels import reference
from mopo_kernels.backends import Head, TileBackend, tile_backend
from mopo_kernels.coefficients import pair_slope, safe_divisor, sequence_coefficient

# Fewer rows than this make a product so narrow that computing it twice over a tiled vocabulary is faster.
MIN_ROWS = 32
MIN_COLUMNS = 128
# Bytes a row of a chunk takes besides hidden and logits: target, column, masks, running statistics, coefficient.
ROW_OVERHEAD = 96
# A backend's temporaries: at most an eighth of the tile, or one row of it.
TEMPORARY_SHARE = 1 / 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Plan:
    """How a head of V x H is cut within a buffer: chunks of ``rows``, tiles of ``columns``, weights converted
    ``weight_columns`` vocabulary entries at a time (0: used as they are)."""

    rows: int
    columns: int
    weight_columns: int


@dataclass(frozen=True)
class Layout:
    """The sizes from which a :class:`Plan` follows; all in elements but the item sizes, in bytes."""

    hidden_size: int
    vocabulary: int
    accumulate: torch.dtype
    operand: torch.dtype
    weight: torch.dtype

    def tile_bytes(self) -> float:
        """Bytes an element of a tile takes: itself, the backend's temporary, a copy in the products' dtype."""
        copy = self.operand.itemsize if self.operand != self.accumulate else 0
        return self.accumulate.itemsize * (1 + TEMPORARY_SHARE) + copy

    def row_bytes(self) -> int:
        """Bytes a row takes besides its tile: gathered hidden, its gradient, statistics."""
        return self.hidden_size * (self.operand.itemsize + self.accumulate.itemsize) + ROW_OVERHEAD

    def least_bytes(self) -> int:
        """The smallest buffer that can work at all: one row, one column."""
        scratch = self.hidden_size * self.operand.itemsize if self.weight != self.operand else 0
        return int(self.row_bytes() + self.tile_bytes() + self.accumulate.itemsize + scratch) + 1

    def weight_columns(self, max_buffer_bytes: int) -> int:
        """Vocabulary entries converted at a time, in a quarter of the buffer; 0 if the weight is used as it is."""
        if self.weight == self.operand:
            return 0
        return min(self.vocabulary, max(1, max_buffer_bytes // (4 * self.hidden_size * self.operand.itemsize)))

    def tile_budget(self, max_buffer_bytes: int) -> int:
        """What is left for rows and tiles."""
        return max_buffer_bytes - self.weight_columns(max_buffer_bytes) * self.hidden_size * self.operand.itemsize

    def whole_rows(self, max_buffer_bytes: int) -> int:
        """Rows that fit with a tile across the whole vocabulary; may be 0 or less."""
        available = self.tile_budget(max_buffer_bytes) - self.vocabulary * self.accumulate.itemsize
        return int(available // (self.vocabulary * self.tile_bytes() + self.row_bytes()))

    def plan(self, rows: int, max_buffer_bytes: int, whole: bool = False) -> Plan:
        """The cut for ``rows`` rows; with ``whole`` tiles span the vocabulary however few rows that leaves a chunk."""
        if max_buffer_bytes < self.least_bytes():
            raise ValueError(
                f"max_buffer_bytes must be at least {self.least_bytes()} for hidden size {self.hidden_size}; "
                f"got {max_buffer_bytes}"
            )
        weight_columns, whole_rows = self.weight_columns(max_buffer_bytes), self.whole_rows(max_buffer_bytes)
        rows = max(1, rows)
        if whole_rows >= (1 if whole else min(rows, MIN_ROWS)):
            return Plan(min(rows, whole_rows), self.vocabulary, weight_columns)
        available, per_element, per_row = self.tile_budget(max_buffer_bytes), self.tile_bytes(), self.row_bytes()
        least = per_row + min(self.vocabulary, MIN_COLUMNS) * per_element
        chunk = max(1, min(rows, MIN_ROWS, int(available // least)))
        columns = int((available - chunk * per_row) // (chunk * per_element + self.accumulate.itemsize))
        return Plan(chunk, max(1, min(self.vocabulary, columns)), weight_columns)


def row_chunks(count: int, largest: int) -> Iterator[tuple[int, int]]:
    """0 .. count in the fewest chunks of at most ``largest``, as even as they go."""
    chunks = -(-count // largest) if count else 0
    for c in range(chunks):
        yield count * c // chunks, count * (c + 1) // chunks


class LinearHead:
    """A head with the working buffers of one call. ``weight`` (V, H), ``bias`` (V,) or None."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        backend: str,
        max_buffer_bytes: int,
        rows: int,
        whole: bool = False,
    ) -> None:
        self.weight = weight
        self.head = head
        self.backend: TileBackend = tile_backend(backend)
        self.layout = layout_of(weight)
        self.plan = self.layout.plan(rows, max_buffer_bytes, whole)
        self.bias = None if bias is None else bias.to(self.layout.accumulate)
        self._scratch = weight.new_empty(self.plan.weight_columns * weight.shape[1], dtype=self.layout.operand)

    @cached_property
    def _tile(self) -> Tensor:
        return self.weight.new_empty(self.plan.rows * self.plan.columns, dtype=self.layout.accumulate)

    @property
    def whole(self) -> bool:
        """A tile spans the vocabulary, so that products survive from the fold to the gradient."""
        return self.plan.columns == self.layout.vocabulary

    def column_tiles(self) -> Iterator[tuple[int, int]]:
        return row_chunks(self.layout.vocabulary, self.plan.columns)

    def tile(self, rows: int, columns: int) -> Tensor:
        return self._tile[: rows * columns].view(rows, columns)

    def bias_tile(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]

    def _weight_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Blocks of the weight in the products' dtype."""
        if self.plan.weight_columns == 0:
            yield start, stop, self.weight[start:stop]
            return
        for a in range(start, stop, self.plan.weight_columns):
            b = min(a + self.plan.weight_columns, stop)
            block = self._scratch[: (b - a) * self.weight.shape[1]].view(b - a, -1)
            yield a, b, block.copy_(self.weight[a:b])

    def products_(self, hidden: Tensor, tile: Tensor, start: int, stop: int) -> None:
        """``tile = hidden @ weight[start:stop].T``; hidden (R, H) in the products' dtype."""
        for a, b, block in self._weight_blocks(start, stop):
            _mm(hidden, block.T, tile[:, a - start : b - start])

    def backward_products(
        self,
        hidden: Tensor,
        tile: Tensor,
        start: int,
        stop: int,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """Add a gradient tile's share to dhidden (R, H), dweight (V, H), dbias (V,), all accumulated in place."""
        if dbias is not None:
            dbias[start:stop] += tile.sum(dim=0)
        operand = tile.to(self.layout.operand)
        if dhidden is not None:
            for a, b, block in self._weight_blocks(start, stop):
                _addmm_(dhidden, operand[:, a - start : b - start], block)
        if dweight is not None:
            _addmm_(dweight[start:stop], operand.T, hidden)

    def fold(self, hidden: Tensor, target: Tensor, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of the target and log-sum-exp (fp64), both (R,). The products stay in the tile if ``whole``;
        with ``products`` (R, V) they are written there."""
        rows = hidden.shape[0]
        maximum = hidden.new_full((rows,), -torch.inf, dtype=self.layout.accumulate)
        total, picked = torch.zeros_like(maximum), torch.zeros_like(maximum)
        for start, stop in self.column_tiles():
            tile = self.tile(rows, stop - start) if products is None else products[:, start:stop]
            self.products_(hidden, tile, start, stop)
            self.backend.fold(tile, self.bias_tile(start, stop), target, start, self.head, maximum, total, picked)
        # Not picked - logsumexp: the difference to the maximum is small, so it rounds less. The log-sum-exp itself is
        # in fp64, since its rounding would tilt the gradient of the whole row.
        return (picked - maximum) - torch.log(total), maximum.double() + torch.log(total.double())

    def unfold(
        self,
        hidden: Tensor,
        target: Tensor,
        logsumexp: Tensor,
        coefficient: Tensor | None,
        held: bool,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """Gradients of ``sum coefficient * logprob`` for a chunk; with ``held`` its products still lie in the tile."""
        rows = hidden.shape[0]
        for start, stop in self.column_tiles():
            tile = self.tile(rows, stop - start)
            if not held:
                self.products_(hidden, tile, start, stop)
            self.backend.gradient_(tile, self.bias_tile(start, stop), target, start, self.head, logsumexp, coefficient)
            self.backward_products(hidden, tile, start, stop, dhidden, dweight, dbias)


def layout_of(weight: Tensor) -> Layout:
    accumulate = accumulation_dtype(weight.dtype)
    # Half precision products on a CPU without native support run several times slower than fp32 ones.
    operand = accumulate if weight.device.type == "cpu" else weight.dtype
    return Layout(weight.shape[1], weight.shape[0], accumulate, operand, weight.dtype)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm_(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == accumulator.dtype:
        accumulator.addmm_(a, b)
    else:
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)


@dataclass(frozen=True)
class Chunk:
    """Rows of one chunk: ``start .. stop`` among those asked for, row numbers, hidden (R, H) in the products'
    dtype, target (R,) with 0 for ignored ones, and which are scored (all, after compaction)."""

    start: int
    stop: int
    rows: Tensor
    hidden: Tensor
    target: Tensor
    scored: Tensor


class _Pass:
    """One pass over the scored rows of a packed batch: gathers chunks, folds them, accumulates their gradients.

    Rows are named by their position among the scored ones. On an accelerator every row counts as scored (counting them
    would wait for the device) and ignored ones get coefficient 0: pack first, with :func:`mopo_kernels.pack_responses`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        head: Head,
        backend: str,
        max_buffer_bytes: int,
        whole: bool = False,
    ) -> None:
        self.hidden, self.target, self.ignore_index = hidden, target, ignore_index
        if target.device.type == "cpu":
            self.scored = (target != ignore_index).nonzero()[:, 0]
        else:
            self.scored = torch.arange(target.shape[0], device=target.device)
        self.count = self.scored.shape[0]
        self.head = LinearHead(weight, bias, head, backend, max_buffer_bytes, self.count, whole)
        self.dhidden: Tensor | None = None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None

    def chunks(self, positions: Tensor | None = None) -> Iterator[Chunk]:
        """The scored rows, or those at ``positions`` among them, in order, a chunk at a time."""
        selected = self.scored if positions is None else self.scored[positions]
        for start, stop in row_chunks(selected.shape[0], self.head.plan.rows):
            rows = selected[start:stop]
            target = self.target.index_select(0, rows)
            scored = target != self.ignore_index
            hidden = self.hidden.index_select(0, rows).to(self.head.layout.operand)
            yield Chunk(start, stop, rows, hidden, target.where(scored, 0), scored)

    def fold(self, chunk: Chunk, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability, 0 where ignored, and log-sum-exp of the chunk's rows, (R,)."""
        logprob, logsumexp = self.head.fold(chunk.hidden, chunk.target, products)
        return logprob.where(chunk.scored, 0), logsumexp

    def unfold(self, chunk: Chunk, logsumexp: Tensor, coefficient: Tensor | None, held: bool) -> None:
        """Add the gradients of ``sum coefficient * logprob`` over the chunk; None stands for 1."""
        if coefficient is not None:
            coefficient = coefficient.where(chunk.scored, 0)
        elif chunk.rows.device.type != "cpu":
            coefficient = chunk.scored.to(self.head.layout.accumulate)
        dhidden = None
        if self.dhidden is not None:
            dhidden = chunk.hidden.new_zeros(chunk.hidden.shape, dtype=self.head.layout.accumulate)
        self.head.unfold(chunk.hidden, chunk.target, logsumexp, coefficient, held, dhidden, self.dweight, self.dbias)
        if self.dhidden is not None and dhidden is not None:
            self.dhidden.index_copy_(0, chunk.rows, dhidden)

    def accumulate(self, need_hidden: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Zeroed accumulators for dhidden, dweight, dbias, of size 0 for what is not needed."""
        weight, dtype = self.head.weight, self.head.layout.accumulate
        dhidden = self.hidden.new_zeros(self.hidden.shape if need_hidden else (0,), dtype=dtype)
        dweight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=dtype)
        dbias = weight.new_zeros(weight.shape[:1] if need_bias else (0,), dtype=dtype)
        self.dhidden = dhidden if need_hidden else None
        self.dweight = dweight if need_weight else None
        self.dbias = dbias if need_bias else None
        return dhidden, dweight, dbias


def keeps_products(rows: int, weight: Tensor, max_buffer_bytes: int) -> bool:
    """Whether a trained head's products are kept for backward: they fit three quarters of the buffer, the last quarter
    being left for turning them into gradients."""
    layout = layout_of(weight)
    if rows * weight.shape[0] * layout.accumulate.itemsize > max_buffer_bytes * 3 // 4:
        return False
    return layout.whole_rows(max_buffer_bytes // 4) >= 1


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    head: Head,
    backend: str,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token log-probability (N,), log-sum-exp (N,) in fp64, and what makes backward cheap:

    * head frozen: the rows ``d logprob / d hidden`` (N, H), so that backward only scales them (2 products in all);
    * head trained: the products (N, V), scored rows first, if they fit the buffer (3 products in all), else none (4).
    """
    dtype = accumulation_dtype(hidden.dtype)
    logprob = hidden.new_zeros(hidden.shape[0], dtype=dtype)
    logsumexp = hidden.new_zeros(hidden.shape[0], dtype=torch.float64)
    frozen = need_hidden and not (need_weight or need_bias)
    keep = (need_weight or need_bias) and keeps_products(hidden.shape[0], weight, max_buffer_bytes)
    products = weight.new_empty((hidden.shape[0], weight.shape[0]) if keep else (0,), dtype=dtype)
    budget = max_buffer_bytes // 4 if keep else max_buffer_bytes
    work = _Pass(hidden, weight, target, bias, ignore_index, head, backend, budget, whole=keep)
    unit, _, _ = work.accumulate(frozen, False, False)
    for chunk in work.chunks():
        value, lse = work.fold(chunk, products[chunk.start : chunk.stop] if keep else None)
        logprob[chunk.rows], logsumexp[chunk.rows] = value, lse
        if frozen:
            work.unfold(chunk, lse, None, held=work.head.whole)
    if keep:
        products[work.count :].zero_()
    return logprob, logsumexp, unit, products


def linear_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    products: Tensor,
    ignore_index: int,
    head: Head,
    backend: str,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum grad * logprob``, in the accumulation dtype; ``products`` as kept by forward, or empty."""
    kept = products.dim() == 2
    budget = max_buffer_bytes // 4 if kept else max_buffer_bytes
    work = _Pass(hidden, weight, target, bias, ignore_index, head, backend, budget, whole=kept)
    gradients = work.accumulate(need_hidden, need_weight, need_bias)
    for chunk in work.chunks():
        if kept:
            work.head.tile(chunk.stop - chunk.start, weight.shape[0]).copy_(products[chunk.start : chunk.stop])
        work.unfold(chunk, logsumexp[chunk.rows], grad[chunk.rows], held=kept)
    return gradients


@dataclass(frozen=True)
class PairData:
    """What the loss needs besides log-probabilities: see :func:`mopo_kernels.mopo_loss`. All tensors but ``pairs`` and
    ``prompt_index`` are in the accumulation dtype already."""

    pairs: Tensor
    preference: Tensor
    objective_weight: Tensor
    ref_logprob: Tensor
    tau: float
    loss_type: str
    pair_weight: Tensor | None
    label_rate: Tensor | None
    margin: Tensor | None
    length: Tensor | None
    prompt_index: Tensor | None
    max_ratio: float | None
    estimator: str
    normalizer: Tensor | None


def evaluate_loss(logprob: Tensor, data: PairData) -> reference.PairLoss:
    """The loss of sequence log-probabilities (S,)."""
    return reference.mopo_loss(
        logprob,
        data.ref_logprob,
        data.pairs,
        data.preference,
        data.objective_weight,
        tau=data.tau,
        loss_type=data.loss_type,
        pair_weight=data.pair_weight,
        label_rate=data.label_rate,
        margin=data.margin,
        length=data.length,
        prompt_index=data.prompt_index,
        max_ratio=data.max_ratio,
        estimator=data.estimator,
        normalizer=data.normalizer,
    )


def coefficient(logprob: Tensor, data: PairData, subset: Tensor | None = None) -> Tensor:
    """``g = d loss / d logprob`` (S,), or the share in it of the pairs numbered ``subset``, for which only their own
    sequences' log-probabilities matter. For "cloning" g does not depend on the policy: it is the frozen ratio."""
    if data.loss_type == "cloning":
        assert data.prompt_index is not None
        g = -reference.policy_ratio(
            data.preference, data.pairs, data.objective_weight, data.tau, data.prompt_index, data.max_ratio
        )
        count = torch.full_like(g.sum(), float(logprob.shape[0]))
    else:
        every = slice(None) if subset is None else subset
        i, j = data.pairs[every].unbind(dim=1)
        log_ratio = logprob - data.ref_logprob
        if data.length is not None:
            log_ratio = log_ratio / data.length
        slope = pair_slope(
            log_ratio[i] - log_ratio[j],
            data.preference[every],
            data.objective_weight,
            tau=data.tau,
            loss_type=data.loss_type,
            label_rate=data.label_rate,
            offset=None if data.margin is None else data.margin[every],
        )
        if data.pair_weight is None:
            count = torch.full_like(slope.sum(), float(data.pairs.shape[0]))
        else:
            slope, count = slope * data.pair_weight[every], data.pair_weight.sum()
        g = sequence_coefficient(slope, data.pairs[every], logprob.shape[0])
    g = g / safe_divisor(count if data.normalizer is None else data.normalizer)
    return g if data.length is None else g / data.length


@dataclass
class Group:
    """Sequences, and the pairs, all of which lie among them. ``held``: their rows fit one chunk."""

    sequences: list[int]
    pairs: list[int]
    held: bool


def _components(pairs: list[list[int]], sequences: int) -> list[Group]:
    """Connected components of the sequences under the pairs, in order of their first sequence."""
    parent = list(range(sequences))

    def find(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for i, j in pairs:
        a, b = find(i), find(j)
        parent[max(a, b)] = min(a, b)
    components: dict[int, Group] = {}
    for s in range(sequences):
        components.setdefault(find(s), Group([], [], held=False)).sequences.append(s)
    for p, (i, _) in enumerate(pairs):
        components[find(i)].pairs.append(p)
    return list(components.values())


def closed_groups(pairs: list[list[int]], lengths: list[int], largest: int) -> list[Group]:
    """Sequences of ``lengths`` scored rows in groups that no pair leaves: components packed greedily, in order, into
    chunks of at most ``largest`` rows; a component longer than that stands alone, not held."""
    groups: list[Group] = []
    open_rows = 0
    for component in _components(pairs, len(lengths)):
        rows = sum(lengths[s] for s in component.sequences)
        if rows > largest:
            groups.append(component)
        elif groups and groups[-1].held and open_rows + rows <= largest:
            groups[-1].sequences += component.sequences
            groups[-1].pairs += component.pairs
            open_rows += rows
        else:
            component.held = True
            groups.append(component)
            open_rows = rows
    return groups


def linear_mopo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    data: PairData,
    ignore_index: int,
    head: Head,
    backend: str,
    max_buffer_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[reference.PairLoss, Tensor, Tensor, Tensor]:
    """The loss of a packed batch and its gradients for hidden, weight and bias (size 0 where not needed).

    Three products: a chunk of logits is held until the pairs of its sequences close, g follows from the pairs, and the
    chunk becomes ``g * J`` in place. A component of sequences longer than the buffer is folded first and recomputed
    afterwards: four products for its rows, the same numbers. Without gradients, one product.
    """
    sequences = cu_seqlens.shape[0] - 1
    logprob = hidden.new_zeros(sequences, dtype=accumulation_dtype(hidden.dtype))
    work = _Pass(hidden, weight, target, bias, ignore_index, head, backend, max_buffer_bytes)
    gradients = work.accumulate(need_hidden, need_weight, need_bias)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), work.scored, right=True)

    if not (need_hidden or need_weight or need_bias) or data.loss_type == "cloning":
        g = coefficient(logprob, data) if data.loss_type == "cloning" else None
        for chunk in work.chunks():
            value, lse = work.fold(chunk)
            logprob.index_add_(0, owner[chunk.start : chunk.stop], value)
            if g is not None and (need_hidden or need_weight or need_bias):
                work.unfold(chunk, lse, g[owner[chunk.start : chunk.stop]], held=work.head.whole)
        return evaluate_loss(logprob, data), *gradients

    # The plan is made on the host: it needs lengths and pairs there.
    lengths = torch.bincount(owner, minlength=sequences).tolist()
    first = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    for group in closed_groups(data.pairs.tolist(), lengths, work.head.plan.rows if work.head.whole else 0):
        positions = torch.cat([torch.arange(first[s], first[s + 1]) for s in group.sequences]).to(owner.device)
        pairs = torch.tensor(group.pairs, dtype=torch.int64, device=owner.device)
        logsumexp = logprob.new_empty(positions.shape[0], dtype=torch.float64)
        for chunk in work.chunks(positions):
            value, logsumexp[chunk.start : chunk.stop] = work.fold(chunk)
            logprob.index_add_(0, owner[positions[chunk.start : chunk.stop]], value)
            if group.held:
                work.unfold(chunk, logsumexp, coefficient(logprob, data, pairs)[owner[positions]], held=True)
        if not group.held:
            g = coefficient(logprob, data, pairs)[owner[positions]]
            for chunk in work.chunks(positions):
                part = slice(chunk.start, chunk.stop)
                work.unfold(chunk, logsumexp[part], g[part], held=False)
    return evaluate_loss(logprob, data), *gradients
