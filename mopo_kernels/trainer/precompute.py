"""Log-probabilities of the first reference, computed once and kept beside the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list, gather_object  # type: ignore[import-untyped]
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mopo_kernels.data import PreferenceCollator, PreferenceData
from mopo_kernels.trainer.checkpoint import write_atomically

if TYPE_CHECKING:
    from torch import nn


def data_fingerprint(data: PreferenceData, collator: PreferenceCollator) -> str:
    """Tells data sets apart by prompts and responses, and tokenisations by limits, template and an example's ids."""
    digest = hashlib.sha256()
    for row in data.dataset.select_columns(["prompt", "responses"]):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    digest.update(json.dumps(collator.tokenize([data[0]])[0]).encode())
    tokenizer = collator.tokenizer
    settings = [collator.max_length, collator.max_response_length, collator.truncate, len(tokenizer)]
    digest.update(json.dumps([*settings, str(tokenizer.chat_template)]).encode())
    return digest.hexdigest()


def reference_logprobs(
    model: nn.Module,
    data: PreferenceData,
    collator: PreferenceCollator,
    accelerator: Accelerator,
    *,
    file: Path,
    model_fingerprint: str,
    batch_size: int,
    progress: bool,
) -> list[list[float]]:
    """Summed log-probability of every response under the first reference: per example, per response, nats.

    The ranks share the examples. The result is read from ``file`` when it is there, and written to it when not.

    Args:
        model: with the forward of ``forward.attach``.
        data: the examples.
        collator: of the training run.
        accelerator: its ranks, device and mixed precision, so that the numbers are those of the policy's own pass.
        file: where the numbers are kept, as JSON.
        model_fingerprint: of the reference.
        batch_size: examples a forward pass.
        progress: whether to show a bar.

    Raises:
        ValueError: the file is of another model or other data.
    """
    prints = {"model": model_fingerprint, "data": data_fingerprint(data, collator)}
    # Every rank must take the same branch, and only the first is sure to see the file.
    stored: list[Any] = [None]
    if accelerator.is_main_process and file.is_file():
        stored[0] = json.loads(file.read_text(encoding="utf-8"))
    if accelerator.num_processes > 1:
        broadcast_object_list(stored)
    if stored[0] is not None:
        for name, value in prints.items():
            if stored[0].get(name) != value:
                raise ValueError(
                    f"output_dir: {file} holds reference log-probabilities of other {name} than this run's; "
                    "use another output_dir, or delete the file to compute them again"
                )
        return [list(map(float, row)) for row in stored[0]["logprob"]]

    mine = list(range(accelerator.process_index, len(data), accelerator.num_processes))
    loader: DataLoader[Any] = DataLoader(data.select(mine), batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    rows: list[tuple[int, list[float]]] = []
    device = next(model.parameters()).device
    bar = tqdm(
        total=len(data), desc="Reference log-probabilities", disable=not (progress and accelerator.is_main_process)
    )
    with torch.no_grad(), accelerator.autocast(), bar:
        for batch in loader:
            batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "ref_logprob"}
            logprob = model(**batch, reference_only=True)["ref_logprob"].tolist()
            examples: dict[int, list[float]] = {}
            for position, value in zip(batch["prompt_index"].tolist(), logprob, strict=True):
                examples.setdefault(position, []).append(value)
            rows += zip(mine[len(rows) : len(rows) + len(examples)], examples.values(), strict=True)
            bar.update(len(examples) * accelerator.num_processes)
    if accelerator.num_processes > 1:
        rows = gather_object(rows)
    result = [values for _, values in sorted(rows)]
    if accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**prints, "logprob": result}))
    return result
