"""Time, memory and error of filtered gradients (``gradient_filter``), as ratios to the bare products of the same run.

    python -m bench.gradient_filter                                     # SmolLM2's head on its own answers
    python -m bench.gradient_filter --hidden 2048 --vocabulary 51200    # a head of random numbers, as peaked

Rows of SmolLM2 are the demo's training answers: 5,864 scored tokens, as often as it takes. Rows for a random head are
made so that 64 of its entries, drawn for each row by Zipf's law, have the probabilities by rank that SmolLM2 gives on
average, and the others share 1 %: the least hidden state with these logits. Implementations take turns; medians are
over rounds. Errors are of dhidden and dweight against the exact gradients in fp32 of the same numbers, beside plain
PyTorch's own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.head import DTYPES, peak_mib
from bench.implementations import BARE, BUFFER_BYTES
from bench.provenance import provenance
from mopo_kernels import backends, linear_mopo_loss, naive
from mopo_kernels.files import prepare_file

ROOT = Path(__file__).resolve().parent.parent
PLAIN, EXACT = "plain PyTorch", "exact"
TAU, SEQUENCE = 0.15, 32
# SmolLM2's mean probability of the entry of each rank, on the rows above.
RANKS = (1, 2, 4, 11, 31, 64)
PROBABILITIES = (0.646, 0.128, 0.0321, 0.00523, 0.000747, 0.0002)
BACKGROUND = 0.01
ENTRIES = 64

Gradients = tuple[Tensor, ...]


@dataclass
class Rows:
    """hidden (N, H), target (N,), weight (V, H), and what makes sequences and pairs of them."""

    hidden: Tensor
    target: Tensor
    weight: Tensor
    cu_seqlens: Tensor
    pairs: Tensor
    preference: Tensor
    ref_logprob: Tensor

    @classmethod
    def of(cls, hidden: Tensor, target: Tensor, weight: Tensor) -> Rows:
        """Sequences of 32 rows, in pairs; the reference is the policy's own log-probability and a deviation of 20 nats,
        so that coefficients differ as in training."""
        g = torch.Generator().manual_seed(0)
        sequences = hidden.shape[0] // SEQUENCE // 2 * 2
        cu_seqlens = torch.arange(sequences + 1) * (hidden.shape[0] // sequences)
        cu_seqlens[-1] = hidden.shape[0]
        with torch.no_grad():
            own = torch.cat(
                [
                    torch.log_softmax(h.float() @ weight.float().T, -1).gather(1, t[:, None])[:, 0]
                    for h, t in zip(hidden.split(256), target.split(256), strict=True)
                ]
            )
        deviation = 20 * torch.randn(sequences, generator=g)
        return cls(
            hidden,
            target,
            weight,
            cu_seqlens,
            torch.arange(sequences).view(-1, 2),
            torch.randint(0, 2, (sequences // 2, 2), generator=g).float(),
            naive.segment_sum(own, cu_seqlens) + deviation,
        )

    def to(self, dtype: torch.dtype, trained: bool) -> Rows:
        """The same numbers in another dtype, as leaves of their own."""
        hidden = self.hidden.detach().to(dtype, copy=True).requires_grad_()
        weight = self.weight.detach().to(dtype, copy=True).requires_grad_(trained)
        return Rows(hidden, self.target, weight, self.cu_seqlens, self.pairs, self.preference, self.ref_logprob)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight) if t.requires_grad]


def model_rows(folder: Path, tokens: int) -> Rows:
    """Hidden states of the demo's model before each token of its training answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mopo_kernels import load_preferences
    from mopo_kernels.data import PreferenceCollator

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = load_preferences(ROOT / "examples/demo/data/preferences.jsonl")
    hidden: list[Tensor] = []
    target: list[Tensor] = []
    with torch.no_grad():
        for item in PreferenceCollator(tokenizer, data.objectives).tokenize([data[index] for index in range(60)]):
            for response in item.responses:
                ids = torch.tensor([[*item.prompt, *response]])
                states = model.base_model(ids).last_hidden_state[0]
                hidden.append(states[len(item.prompt) - 1 : -1])
                target.append(ids[0, len(item.prompt) :])
            if sum(map(len, target)) >= tokens:
                break
    rows, ids = torch.cat(hidden), torch.cat(target)
    index = torch.arange(tokens) % rows.shape[0]
    return Rows.of(rows[index], ids[index], model.get_output_embeddings().weight.detach())


def peaked_rows(hidden_size: int, vocabulary: int, tokens: int) -> Rows:
    """Rows for a random head, by the least hidden states whose logits at 64 entries have given probabilities."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden_size, generator=g) * hidden_size**-0.5
    at = torch.arange(1, ENTRIES + 1).double().log()
    known, logs = torch.tensor(RANKS).double().log(), torch.tensor(PROBABILITIES).double().log()
    right = torch.searchsorted(known, at.clamp(max=float(known[-1]))).clamp(1, len(RANKS) - 1)
    share = (at - known[right - 1]) / (known[right] - known[right - 1])
    probability = torch.exp(logs[right - 1] + share * (logs[right] - logs[right - 1]))
    probability *= (1 - BACKGROUND) / probability.sum()
    frequency = 1 / torch.arange(1, vocabulary + 1)
    hidden, target = [], []
    for part in torch.arange(tokens).split(256):
        # As tokens are: by Zipf's law, so that rows share their frequent entries.
        entries = torch.multinomial(frequency.expand(part.shape[0], -1), ENTRIES, generator=g)
        rows = weight[entries].double()
        gram = rows @ rows.transpose(1, 2)
        level = torch.full((part.shape[0], 1), 15.0, dtype=torch.float64)
        for _ in range(20):
            # The others' logits are normal with the spread that the hidden state's norm gives: a fixed point.
            states = (rows.transpose(1, 2) @ torch.linalg.solve(gram, (probability.log() + level)[..., None]))[..., 0]
            variance = states.square().sum(1, keepdim=True) / hidden_size
            level = math.log(vocabulary / BACKGROUND) + variance / 2
        if not bool((level < 30).all()):
            raise ValueError(f"hidden: expected enough for the others' logits to stay small; got {hidden_size}")
        hidden.append(states.float())
        rank = torch.multinomial(probability, part.shape[0], replacement=True, generator=g)
        target.append(entries.gather(1, rank[:, None])[:, 0])
    return Rows.of(torch.cat(hidden), torch.cat(target), weight)


def peakedness(rows: Rows) -> dict[str, float]:
    """Of up to 512 rows: the mean largest probability, and how many entries of a row reach 2^-8, 2^-12 and 2^-16."""
    p = torch.softmax(rows.hidden[:512].float() @ rows.weight.float().T, -1)
    counts = {f"2^-{k}": float((p >= 2.0**-k).sum(1).double().mean()) for k in (8, 12, 16)}
    return {"largest": float(p.amax(1).double().mean()), **counts}


def fused(rows: Rows, share: float | None) -> Gradients:
    output = linear_mopo_loss(
        rows.hidden,
        rows.weight,
        rows.target,
        rows.cu_seqlens,
        rows.pairs,
        rows.preference,
        torch.tensor([1.0, 0.3]),
        ref_logprob=rows.ref_logprob,
        tau=TAU,
        gradient_filter=share,
        max_buffer_bytes=BUFFER_BYTES,
    )
    return torch.autograd.grad(output.loss, rows.leaves())


def plain(rows: Rows) -> Gradients:
    logits = (rows.hidden @ rows.weight.T).float()
    logprob = naive.segment_sum(logits.log_softmax(-1).gather(1, rows.target[:, None])[:, 0], rows.cu_seqlens)
    loss = naive.mopo_loss(
        logprob, rows.ref_logprob, rows.pairs, rows.preference, torch.tensor([1.0, 0.3]), tau=TAU
    ).loss
    return torch.autograd.grad(loss, rows.leaves())


def bare(rows: Rows) -> Gradients:
    """The products alone, in chunks as large as the buffer: by torch in fp32, in bf16 by the library's own where they
    are native, whose results are fp32 as well."""
    backend = backends.tile_backend(backends.resolve("auto", rows.hidden.device))
    hidden, weight = rows.hidden.detach(), rows.weight.detach()
    native = bool(backend.product_scratch(hidden.dtype, BUFFER_BYTES))
    size = max(1, BUFFER_BYTES // 4 // weight.shape[0])

    def product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        if native:
            backend.product_(out, a, b, accumulate)
        elif accumulate:
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    dhidden = torch.empty(hidden.shape)
    dweight = torch.empty(weight.shape) if rows.weight.requires_grad else None
    tile = torch.empty(min(size, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], size):
        part = hidden[start : start + size]
        values = tile[: part.shape[0]]
        product(values, part, weight.T, False)
        product(dhidden[start : start + size], values, weight, False)
        if dweight is not None:
            product(dweight, values.T, part, start > 0)
    return (dhidden,) if dweight is None else (dhidden, dweight)


def errors(got: Gradients, exact: Gradients) -> list[float]:
    """Relative, of dhidden and, if there is one, dweight."""
    return [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def measure(rows: Rows, dtype: torch.dtype, trained: bool, shares: list[float], rounds: int) -> dict[str, Any]:
    exact = fused(rows.to(torch.float32, trained), None)
    calls: dict[str, Callable[[Rows], Gradients]] = {BARE: bare, EXACT: functools.partial(fused, share=None)}
    calls |= {f"2^{math.log2(share):g}": functools.partial(fused, share=share) for share in shares}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(rounds + 1), description="rounds"):
        for name, call in calls.items():
            inputs = rows.to(dtype, trained)
            start = time.perf_counter()
            call(inputs)
            seconds[name].append(time.perf_counter() - start)
    results: dict[str, Any] = {}
    for name, call in calls.items():
        inputs = rows.to(dtype, trained)
        results[name] = {
            "seconds": statistics.median(seconds[name][1:]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name][1:], seconds[BARE][1:], strict=True)),
            "peak_mib": peak_mib(functools.partial(call, inputs)),
            "errors": None if name == BARE else errors(call(inputs), exact),
        }
    results[PLAIN] = {"errors": errors(plain(rows.to(dtype, trained)), exact)}
    return results


def show(record: dict[str, Any]) -> None:
    work = record["workload"]
    head = "trained" if work["trained"] else "frozen"
    table = Table(title=f"N {work['tokens']}, H {work['hidden']}, V {work['vocabulary']}, {work['dtype']}, {head}")
    for heading in ("gradient_filter", "time / bare", "seconds", "peak MiB", "error of dhidden", "of dweight"):
        table.add_column(heading, no_wrap=True)
    for name, row in record["results"].items():
        found = [f"{error:.1e}" for error in row["errors"] or ()]
        timed = [f"{row['ratio']:.2f}", f"{row['seconds']:.2f}", f"{row['peak_mib']:.0f}"] if "ratio" in row else []
        table.add_row(name, *(timed or ["-"] * 3), *found, *["-"] * (2 - len(found)))
    Console(width=max(100, Console().width)).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "runs/demo/model", help="the demo's, from make_model.py")
    parser.add_argument("--hidden", type=int, help="with --vocabulary: a random head in place of the model's")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--tokens", type=int, default=1024, help="scored rows, at least 64")
    parser.add_argument("--frozen", action="store_true", help="freeze the head")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--powers", type=int, nargs="+", default=[8, 10, 12, 13, 14], help="shares 2^-POWER")
    parser.add_argument("--rounds", type=int, default=7, help="at least 2")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if (options.hidden is None) != (options.vocabulary is None):
        parser.error("arguments --hidden and --vocabulary: expected both or neither")
    for name, got, least in (("tokens", options.tokens, 2 * SEQUENCE), ("rounds", options.rounds, 2)):
        if got < least:
            parser.error(f"argument --{name}: expected at least {least}; got {got}")
    if options.output is not None:
        try:
            prepare_file("--output", options.output)
        except ValueError as error:
            parser.error(str(error))
    if options.hidden is None:
        rows = model_rows(options.model, options.tokens)
    else:
        rows = peaked_rows(options.hidden, options.vocabulary, options.tokens)
    shares = [2.0**-power for power in options.powers]
    record = {
        "workload": {
            "tokens": options.tokens,
            "hidden": rows.weight.shape[1],
            "vocabulary": rows.weight.shape[0],
            "rows": "random" if options.hidden else "SmolLM2",
            "trained": not options.frozen,
            "dtype": options.dtype,
            "threads": torch.get_num_threads(),
        },
        "peakedness": peakedness(rows),
        "results": measure(rows, DTYPES[options.dtype], not options.frozen, shares, options.rounds),
        "rounds": options.rounds,
        **provenance("bench.gradient_filter", sys.argv[1:] if arguments is None else arguments),
    }
    show(record)
    print(json.dumps(record["peakedness"]))
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
