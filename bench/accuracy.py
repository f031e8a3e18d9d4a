"""Error of the loss over the head against fp64: each implementation's loss and gradients on the same rounded numbers.

    python -m bench.accuracy                 # about a minute; --output FILE

The truth is plain PyTorch in fp64, on the inputs as they are in the implementation's dtype. An error is relative, by
the Euclidean norm, and the root mean square over several random inputs, as a single one is a matter of luck: what is
summed in another order rounds otherwise. Beside it stands its multiple of the error of plain PyTorch in that dtype with
the same loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.head import DTYPES
from bench.implementations import TAU, Implementation, Inputs, Result, Workload, available, policy_and_reference
from bench.provenance import provenance
from bench.scaling_curves import groups
from mopo_kernels import naive, pack_responses
from mopo_kernels.files import prepare_file

# Random inputs of each kind.
DRAWS = 12
# A vocabulary that no block divides. Large enough for sums of many terms, small enough for fp64.
SMALL = Workload(hidden=256, vocabulary=8111, prompts=4, length=64)


def truth(x: Inputs, loss: str) -> Result:
    """The loss and the gradients of ``x.leaves()`` in fp64, by plain PyTorch."""
    exact = replace(
        x,
        **{
            name: getattr(x, name).detach().double().requires_grad_(getattr(x, name).requires_grad)
            for name in ("hidden", "ref_hidden", "weight")
        },
    )

    def logprob(hidden: Tensor) -> Tensor:
        rows, target, cu_seqlens = pack_responses(hidden, exact.labels)
        picked = (rows @ exact.weight.T).log_softmax(dim=-1).gather(-1, target[:, None])[:, 0]
        return naive.segment_sum(picked, cu_seqlens)

    policy, ref = policy_and_reference(exact, logprob)
    preference, weight, loss_type = exact.preference.double(), exact.objective_weight.double(), "regression"
    if loss == "DPO":
        # One objective, and the first response preferred.
        preference, weight, loss_type = torch.ones_like(preference[:, :1]), weight.new_ones(1), "sigmoid"
    value = naive.mopo_loss(policy, ref, exact.pairs, preference, weight, tau=TAU, loss_type=loss_type).loss
    return value, *torch.autograd.grad(value, exact.leaves())


def error(got: Result, expected: Result) -> dict[str, float]:
    """Relative errors of the loss and, the larger one, of the gradients."""
    loss, *gradients = (((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True))
    return {"loss": loss, "gradient": max(gradients)}


def errors(work: Workload, implementations: dict[str, Implementation], draws: int = DRAWS) -> dict[str, dict[str, Any]]:
    """Of every implementation with a loss: its errors, and the gradient's as a multiple of plain PyTorch's."""
    judged = {name: one for name, one in implementations.items() if one.expected is not None}
    plain: dict[Callable[[Inputs], Result], list[dict[str, float]]] = {}
    own: dict[str, list[dict[str, float]]] = {name: [] for name in judged}
    for seed in range(draws):
        x = Inputs.make(work, seed)
        expected = {loss: truth(x, loss) for loss in {one.loss for one in judged.values()}}
        for name, implementation in judged.items():
            assert implementation.expected is not None
            if len(known := plain.setdefault(implementation.expected, [])) == seed:
                known.append(error(implementation.expected(x), expected[implementation.loss]))
            own[name].append(error(implementation.run(x), expected[implementation.loss]))
    found = {}
    for name, implementation in judged.items():
        assert implementation.expected is not None
        rms = {key: statistics.fmean(row[key] ** 2 for row in own[name]) ** 0.5 for key in ("loss", "gradient")}
        usual = statistics.fmean(row["gradient"] ** 2 for row in plain[implementation.expected]) ** 0.5
        found[name] = {**rms, "times_plain": rms["gradient"] / usual, "against": implementation.loss}
    return found


def show(record: dict[str, Any], console: Console) -> None:
    """A table: the gradient's error and its multiple of plain PyTorch's."""
    work = record["workload"]
    table = Table(
        title=f"error of the gradients against fp64: N {work['scored']}, H {work['hidden']}, V {work['vocabulary']}"
    )
    table.add_column("implementation", no_wrap=True)
    for group in record["groups"]:
        table.add_column(f"{group['dtype']}, {'trained' if group['trained'] else 'frozen'}", justify="right")
    for name in dict.fromkeys(name for group in record["groups"] for name in group["results"]):
        rows = [group["results"][name] for group in record["groups"]]
        table.add_row(name, *(f"{row['gradient']:.1e} ({row['times_plain']:.2f} x plain)" for row in rows))
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--implementations", nargs="+", default=[], metavar="NAME", help="only those whose name contains one of these"
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="random inputs of each kind")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error(f"argument --draws: expected at least 1; got {options.draws}")
    if options.output is not None:
        try:
            prepare_file("--output", options.output)
        except ValueError as problem:
            parser.error(str(problem))
    try:
        implementations, unavailable = available(tuple(options.implementations))
    except ValueError as problem:
        parser.error(f"argument --implementations: {problem}")
    found = []
    for dtype, trained in groups(tuple(DTYPES)):
        work = replace(SMALL, trained=trained, dtype=DTYPES[dtype])
        found.append({"dtype": dtype, "trained": trained, "results": errors(work, implementations, options.draws)})
    record = {
        "workload": {**asdict(SMALL), "dtype": None, "trained": None, "scored": SMALL.scored},
        "draws": options.draws,
        "groups": found,
        "unavailable": unavailable,
        **provenance("bench.accuracy", sys.argv[1:] if arguments is None else arguments),
    }
    show(record, Console(width=max(150, Console().width)))
    print(json.dumps(record))
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
