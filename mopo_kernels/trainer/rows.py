"""The rows of a run before its first step: tokenised, and looked at for what the model cannot take."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyarrow import compute

from mopo_kernels.checks import LARGEST
from mopo_kernels.data import DataError, PreferenceCollator, PreferenceData
from mopo_kernels.mappings import parse_json
from mopo_kernels.text import one_line
from mopo_kernels.trainer.config import BEST_METRIC, MOPOConfig
from mopo_kernels.trainer.lm_head import causal_lm

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

logger = logging.getLogger(__name__)

_FORMS = {
    "turns": "chat turns",
    "rendered": "text to which a template was applied before",
    "completion": "text that the responses continue",
    "text": "text as it stands",
}


def make_collator(
    args: MOPOConfig, tokenizer: Any, objectives: Sequence[str], *, shared_prompts: bool = False
) -> PreferenceCollator:
    """The collator of a run."""
    return PreferenceCollator(
        tokenizer,
        objectives,
        max_length=args.max_length,
        max_response_length=args.max_response_length,
        truncate=args.truncate_responses,
        shared_prompts=shared_prompts,
        chat=args.chat,
        control_tokens=args.control_tokens,
        chat_template_kwargs=parse_json("chat_template_kwargs", args.chat_template_kwargs),
    )


def prepare_rows(
    model: nn.Module, collator: Any, parts: Mapping[str, PreferenceData], args: MOPOConfig, *, quiet: bool = False
) -> None:
    """Tokenise every example of every part, for all batches to come, and say how they were taken.

    Args:
        model: that they are for.
        collator: its batches; of another one than ``PreferenceCollator`` nothing is known before it is called.
        parts: data sets by the argument that they were given as.
        args: the configuration.
        quiet: say nothing.

    Raises:
        DataError: an example that the chat template refuses, that the length limits refuse, or that is longer than the
            model's positions. ValueError: a token that the model's embedding has no row for, or weights whose sum is
            too large.
    """
    for argument, data in parts.items():
        _check_weights(argument, data)
    if not isinstance(collator, PreferenceCollator):
        return
    _check_padding(model, collator.tokenizer)
    for argument, data in parts.items():
        with args.main_process_first(desc=f"tokenising {argument}"):
            try:
                table = collator.prepare(data, args.dataset_num_proc)
            except DataError as error:
                raise error.at(argument, error.line) from None
        _check_ids(model, collator, argument, data, table)
        _check_positions(model, collator, argument, data, table)
        for note in () if quiet else _notes(collator, table):
            logger.warning("%s: %s", argument, note)


def check_labels(
    args: MOPOConfig,
    objectives: Sequence[str],
    primary: str,
    parts: Mapping[str, PreferenceData],
    *,
    best: str | None = None,
    judged: bool = False,
    quiet: bool = False,
) -> None:
    """Every data set must have the labels of what is measured on it.

    Args:
        args: the configuration.
        objectives: names of all.
        primary: that of the maximised one.
        parts: data sets by name, of which ``dual`` moves the multipliers and those that begin with ``eval`` are
            evaluated; ``dual`` is, too, where there is none of these.
        best: the metric by which a checkpoint is the best, if there is one.
        judged: judges measure on the dual data, not its labels.
        quiet: say nothing of labels that are missed, but not needed.

    Raises:
        ValueError: labels without which nothing would be measured, multipliers would not move, or no checkpoint would
            be the best.
    """
    bounds = list(args.thresholds or {})
    metric = (best or "").removeprefix("eval_")
    evaluated = [name for name in parts if name.startswith("eval")] or (["dual"] if args.eval_strategy != "no" else [])
    for name, data in parts.items():
        if name not in (*evaluated, "dual"):
            continue
        labelled = {
            objective
            for row in data.dataset.select_columns(["pairs"])
            for pair in row["pairs"]
            for objective, value in pair["preference"].items()
            if value is not None
        }
        found = ", ".join(map(one_line, sorted(labelled))) or "no objective"
        _, _, own = name.partition("_")
        argument = "dual_dataset" if name == "dual" else f"eval_dataset[{own!r}]" if own else "eval_dataset"
        decides = name in evaluated and metric in (BEST_METRIC, f"{own}_{BEST_METRIC}")
        if name == "dual" and not judged and (lacking := [each for each in bounds if each not in labelled]):
            raise ValueError(
                f"{argument}: expected labels of every objective with a threshold, whose multiplier they move; got "
                f"none of {', '.join(lacking)}, but those of {found}"
            )
        lacking = [each for each in (primary, *bounds) if each not in labelled]
        if decides and lacking:
            raise ValueError(
                f"{argument}: expected labels of the primary objective and of every one with a threshold, by which the "
                f"best checkpoint is chosen; got none of {', '.join(lacking)}, but those of {found}"
            )
        if name in evaluated and not labelled & set(objectives):
            raise ValueError(f"{argument}: expected labels of {', '.join(objectives)}; got those of {found}")
        if name in evaluated and lacking and not quiet:
            logger.warning("%s: %s cannot be measured, as no pair has a label of it", name, ", ".join(lacking))


def _check_weights(argument: str, data: PreferenceData) -> None:
    """The loss is divided by the pairs' weights of a step: all of them together must not be too many for it."""
    columns = data.dataset.select_columns(["weight", "pairs"]).with_format("arrow")[:]
    pairs = compute.list_value_length(columns["pairs"])
    total = compute.sum(compute.multiply(columns["weight"], pairs)).as_py()
    if total > LARGEST:
        raise ValueError(
            f"{argument}: expected weights of all pairs that sum to {LARGEST:g} at most (only their ratios count); got "
            f"{total:g}"
        )


def _embedding_rows(model: nn.Module) -> int:
    """Token ids that the model has a vector for."""
    lm = causal_lm(model)
    # A sharded weight may be empty here.
    rows: int = lm.get_input_embeddings().weight.shape[0] or lm.config.get_text_config().vocab_size
    return rows


def _unknown_token(tokenizer: Any, index: int, rows: int, where: str) -> ValueError:
    return ValueError(
        f"processing_class: expected token ids below {rows}, the rows of the model's embedding; got {index} "
        f"({tokenizer.convert_ids_to_tokens(index)!r}) in {one_line(where)} "
        f"(model.resize_token_embeddings({len(tokenizer)}) adds rows, which are then to be trained)"
    )


def _check_padding(model: nn.Module, tokenizer: Any) -> None:
    pad, rows = tokenizer.pad_token_id, _embedding_rows(model)
    if pad is not None and pad >= rows:
        raise _unknown_token(
            tokenizer, pad, rows, "the padding of every row (tokenizer.pad_token = tokenizer.eos_token needs none)"
        )


def _check_ids(
    model: nn.Module, collator: PreferenceCollator, argument: str, data: PreferenceData, table: Dataset
) -> None:
    rows = _embedding_rows(model)
    for index, largest in enumerate(table["largest"]):
        if largest >= rows:
            raise _unknown_token(
                collator.tokenizer, largest, rows, f"example {data[index].name}, row {index + 1} of {argument}"
            )


def _check_positions(
    model: nn.Module, collator: PreferenceCollator, argument: str, data: PreferenceData, table: Dataset
) -> None:
    config = causal_lm(model).config.get_text_config()
    # Linear biases (ALiBi) have no last position, nor have relative ones, whose configuration says -1 (XLNet).
    limit = None if getattr(config, "alibi", False) else getattr(config, "max_position_embeddings", None)
    if limit is None or limit < 1 or (collator.max_length is not None and collator.max_length <= limit):
        return
    cut = collator.max_response_length if collator.truncate else None
    for index, (prompt, *responses) in enumerate(table["lengths"]):
        longest = prompt + (max(responses) if cut is None else min(max(responses), cut))
        if longest > limit:
            raise DataError(
                f"example {data[index].name}: {longest} tokens, more than the model's {limit} positions "
                f"(with max_length={limit}, skip_overlong or drop_overlong of the data leaves such rows out)",
                argument,
                index + 1,
            )


def _notes(collator: PreferenceCollator, table: Dataset) -> list[str]:
    """How the rows were taken, where it is not all in one way."""
    count = len(table)
    notes = []
    forms = Counter(table["form"])
    if forms["rendered"] or forms["completion"]:
        shares = ", ".join(f"{number} as {_FORMS[form]}" for form, number in forms.items())
        notes.append(f"of {count} examples {shares} (chat=always or chat=never takes strings in one way)")
    if neutralized := sum(table["neutralized"]):
        notes.append(
            f"{neutralized} of {count} examples have control tokens of the tokenizer inside their texts, which are "
            "encoded as ordinary text (control_tokens=refuse refuses them)"
        )
    if left_out := sum(number > 0 for number in table["left_out"]):
        notes.append(
            f"in {left_out} of {count} examples the end of the prompt has other tokens when a response follows: it is "
            "scored with the response, and a model that is sampled sees another context"
        )
    if forms["turns"] and collator.renderer.writes_no_end:
        notes.append("the chat template writes no end token after the assistant's turn: the tokenizer's EOS ends it")
    return notes
