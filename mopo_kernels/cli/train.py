"""``mopo train``: a configuration file, overridden by ``--key value``, to a trained policy."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import TrainOutput

from mopo_kernels import backends
from mopo_kernels.cli.plan import plan
from mopo_kernels.cli.sweep import train_sweep
from mopo_kernels.data import PreferenceData, load_preferences, summarize
from mopo_kernels.data.synthetic import byte_tokenizer, random_preferences
from mopo_kernels.dual import ThresholdError
from mopo_kernels.mappings import parse_json, parse_mapping
from mopo_kernels.trainer import MOPOConfig, MOPOTrainer, TrainingInterrupted, last_complete_checkpoint
from mopo_kernels.trainer.checkpoint import write_atomically
from mopo_kernels.trainer.model_card import installed_version, model_card
from mopo_kernels.trainer.rows import make_collator

SUMMARY_FILE = "training_summary.json"
# What random data is labelled for when no objectives are named.
RANDOM_OBJECTIVES = ["first", "second"]


@dataclass
class ModelArguments:
    """What is trained, and what comes of it."""

    model_name_or_path: str = field(default="", metadata={"help": "Folder or hub name of a causal language model."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision on the hub."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    random_weights: bool = field(
        default=False,
        metadata={"help": "Random weights: by the configuration in the model's folder, else by architecture."},
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "With random_weights and no folder: a type such as phi, opt or llama."},
    )
    architecture_options: dict | str | None = field(
        default=None, metadata={"help": "Entries of its configuration other than the defaults, as JSON or a mapping."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA adapters; default: full fine-tuning."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA scale; default: twice the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules that get an adapter; default: every linear one but the head."}
    )
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full."})
    merge_adapters: bool = field(
        default=False,
        metadata={"help": "Also save the model with its adapters merged, in output_dir/merged."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print what would be done and what it would take, without loading weights."}
    )
    sweep: str | None = field(
        default=None, metadata={"help": "YAML or JSON file of threshold vectors: trains an adapter for each."}
    )

    def __post_init__(self) -> None:
        self.architecture_options = parse_json("architecture_options", self.architecture_options)
        if self.random_weights:
            if self.architecture is None and not self.has_folder:
                raise ValueError(
                    "architecture: expected a type of model that transformers knows, such as llama, as random_weights "
                    "has no folder with a config.json to take it from; got none"
                )
        elif not self.model_name_or_path:
            raise ValueError("model_name_or_path: expected a folder or hub name; got none")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16; got {self.dtype!r}")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r: expected a positive rank, or none; got {self.lora_r}")
        if self.sweep is not None and self.lora_r is None:
            raise ValueError("lora_r: expected a rank with sweep, which trains adapters on one frozen model; got none")
        if self.merge_adapters and self.lora_r is None:
            raise ValueError("lora_r: expected a rank with merge_adapters; got none")
        if self.sweep is not None and (self.merge_adapters or self.dry_run):
            name = "merge_adapters" if self.merge_adapters else "dry_run"
            raise ValueError(f"{name}: expected false with sweep; got true")

    @property
    def has_folder(self) -> bool:
        """Whether the model's configuration is in a local folder."""
        return bool(self.model_name_or_path) and (Path(self.model_name_or_path) / "config.json").is_file()

    @property
    def description(self) -> str:
        """What is trained, in words."""
        if not self.random_weights:
            return self.model_name_or_path
        return f"{self.model_name_or_path if self.has_folder else self.architecture} with random weights"


@dataclass
class DataArguments:
    """What it is trained on."""

    train_file: str | None = field(default=None, metadata={"help": "JSON Lines or parquet file, or a folder of them."})
    eval_file: str | None = field(default=None, metadata={"help": "The same, held out for evaluation."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, instead of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    dataset_dir: str | None = field(default=None, metadata={"help": "Sub-folder of the hub data set."})
    train_split: str | None = field(default=None, metadata={"help": "Split to train on, when there are several."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of dataset_name to evaluate on."})
    data_format: str = field(default="auto", metadata={"help": "auto, canonical, trl, hh-rlhf, ..."})
    data_options: dict | str | None = field(
        default=None, metadata={"help": "Further options of load_preferences, as JSON or a mapping."}
    )
    on_data_error: str = field(default="raise", metadata={"help": "raise, or skip bad rows and count them."})
    skip_overlong: bool = field(
        default=False,
        metadata={"help": "Leave out examples that are longer than max_length allows, or that the template refuses."},
    )
    eval_fraction: float = field(default=0.0, metadata={"help": "Share of prompts to hold out of the training data."})
    split_seed: int = field(default=0, metadata={"help": "Seed of that choice."})
    max_examples: int | None = field(default=None, metadata={"help": "Read this many rows at most."})
    random_data: dict | str | None = field(
        default=None,
        metadata={"help": "Sizes of the data made up with random_weights: examples=64,responses=4,..."},
    )

    def __post_init__(self) -> None:
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError("train_file: expected it or dataset_name, not both; got both")
        sizes = parse_mapping("random_data", self.random_data)
        known = ("examples", "responses", "prompt_length", "response_length")
        if unknown := [name for name in sizes if name not in known]:
            raise ValueError(f"random_data: expected sizes among {', '.join(known)}; got {', '.join(unknown)}")
        if sizes and self.is_given:
            raise ValueError("random_data: expected it without train_file and dataset_name; got both")
        self.random_data = {name: int(value) for name, value in sizes.items()}
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError(f"eval_split: expected dataset_name with it; got {self.eval_split!r} without")
        held = [name for name in ("eval_file", "eval_split") if getattr(self, name)] + ["eval_fraction"] * (
            self.eval_fraction != 0
        )
        if len(held) > 1:
            raise ValueError(f"{held[0]}: expected one way to hold data out; got also {held[1]}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: expected a share in [0, 1); got {self.eval_fraction}")
        self.data_options = parse_json("data_options", self.data_options)

    @property
    def is_given(self) -> bool:
        """Whether there is data to load."""
        return self.train_file is not None or self.dataset_name is not None


class _Parser(HfArgumentParser):
    """Raises what argparse would print with pages of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, MOPOConfig]:
    """The three groups of arguments from ``[--config FILE.yaml] [--key value ...]``; the command line wins.

    Raises:
        ValueError: an unknown key, or a value or file that does not fit, by name.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, MOPOConfig),  # type: ignore[arg-type]
        prog="mopo train",
        description="Train a policy under thresholds. Every key can stand in the file or on the command line.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Keys and values; the command line overrides them.")
    known = {item.name for group in (ModelArguments, DataArguments, MOPOConfig) for item in fields(group) if item.init}
    config, _ = parser.parse_known_args(argv)
    if config.config is not None:
        try:
            values = yaml.safe_load(Path(config.config).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"config: cannot read {config.config}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"config: {config.config} is not UTF-8: {error}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"config: {config.config} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: expected keys and values in {config.config}; got {type(values).__name__}")
        if unknown := sorted(str(key) for key in values if key not in known):
            raise ValueError(f"config: unknown key {', '.join(unknown)} in {config.config}")
        parser.set_defaults(**values)
    *groups, _, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(f"unknown argument {' '.join(rest)}")
    model, data, training = groups
    if data.random_data and not model.random_weights:
        raise ValueError("random_data: expected it with random_weights only; got it without")
    if not data.is_given and not model.random_weights:
        raise ValueError("train_file: expected it or dataset_name, not both; got neither")
    output = Path(str(training.output_dir))
    if file := next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None):
        raise ValueError(f"output_dir: expected a folder, there or to be made; {file} is a file")
    if training.reference_path is None and data.train_file is not None and (source := Path(data.train_file)).exists():
        training.reference_path = str(source if source.is_dir() else source.parent)
    return model, data, training


def load_data(
    arguments: DataArguments, config: MOPOConfig, tokenizer: Any
) -> tuple[PreferenceData, PreferenceData | None]:
    """(training data, held-out data or None)."""

    def read(source: str, split: str | None, format: str, objectives: list[str] | None, limit: int | None) -> Any:
        return load_preferences(
            source,
            format=format,
            objectives=objectives,
            split=split,
            on_error=arguments.on_data_error,  # type: ignore[arg-type]
            name=arguments.dataset_config,
            data_dir=arguments.dataset_dir,
            limit=limit,
            **parse_json("data_options", arguments.data_options),
        )

    def is_canonical(source: str, split: str | None) -> bool:
        if arguments.data_format != "auto":
            return arguments.data_format == "canonical"
        try:
            read(source, split, "canonical", None, 1)
        except ValueError:
            return False
        return True

    def load(source: str, split: str | None) -> PreferenceData:
        wanted = config.objectives
        if not source:
            sizes: Any = arguments.random_data
            data = random_preferences(wanted or RANDOM_OBJECTIVES, seed=arguments.split_seed, **sizes)
        elif wanted is None or not is_canonical(source, split):
            data = read(source, split, arguments.data_format, wanted, arguments.max_examples)
        else:
            # These rows name their own objectives, of which any choice can be trained on; load_preferences takes a name
            # that it was not given for a mistake.
            data = read(source, split, "canonical", None, arguments.max_examples)
            if unknown := [name for name in wanted if name not in data.objectives]:
                raise ValueError(
                    f"objectives: expected names among {', '.join(data.objectives)}, which {source} has; "
                    f"got {', '.join(unknown)}"
                )
            data = PreferenceData.from_examples(data, wanted, data.skipped)
        if arguments.skip_overlong:
            data = data.drop_overlong(make_collator(config, tokenizer, data.objectives))
        return data

    source = arguments.train_file or arguments.dataset_name or ""
    train = load(source, arguments.train_split)
    if arguments.eval_file is not None:
        return train, load(arguments.eval_file, None)
    if arguments.eval_split is not None:
        return train, load(source, arguments.eval_split)
    if arguments.eval_fraction:
        return train.split(arguments.eval_fraction, arguments.split_seed)
    return train, None


def check_model_name(name: str) -> None:
    """What transformers would take for a hub name, and ask for over the network, though it is plainly a path.

    Raises:
        ValueError: a path that is no folder of a model.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
            raise ValueError(f"model_name_or_path: expected a folder or hub name; there is no folder {name}")
    elif not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"model_name_or_path: expected a folder with a config.json; {name} has none")


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """The libraries' errors do not all say which model they are about, or where its name was given."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"model_name_or_path: {name} cannot be loaded: {error}") from error


def model_config(arguments: ModelArguments) -> Any:
    """The configuration of the model; with ``random_weights`` nothing is asked for over the network."""
    if not arguments.random_weights or arguments.has_folder:
        with _loading(arguments.model_name_or_path):
            return AutoConfig.from_pretrained(arguments.model_name_or_path, revision=arguments.model_revision)
    try:
        return AutoConfig.for_model(
            str(arguments.architecture), **parse_json("architecture_options", arguments.architecture_options)
        )
    except ValueError as error:
        if arguments.architecture not in CONFIG_MAPPING:
            raise ValueError(
                "architecture: expected a type of model that transformers knows, such as llama, phi or opt; got "
                f"{arguments.architecture!r}"
            ) from error
        raise ValueError(f"architecture_options: {error}") from error


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The model's tokenizer; with random weights and no folder that has one, a byte each."""
    folder = Path(arguments.model_name_or_path)
    if not arguments.random_weights or (
        arguments.has_folder and any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    ):
        with _loading(arguments.model_name_or_path):
            return AutoTokenizer.from_pretrained(arguments.model_name_or_path, revision=arguments.model_revision)
    return byte_tokenizer()


def empty_model(arguments: ModelArguments, device: torch.device) -> Any:
    """The model by its configuration alone, on ``device`` in its dtype from the start, so that it is never held twice.

    On the meta device it takes no memory.

    Raises:
        ValueError: a configuration that makes no causal language model.
    """
    config = model_config(arguments)
    dtype = (config.dtype or torch.float32) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    options = {} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}
    with device:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        except (ValueError, TypeError) as error:
            name = arguments.architecture or arguments.model_name_or_path
            raise ValueError(f"architecture: {name} makes no causal language model: {error}") from error
    # What adapters and model cards will say they are for.
    model.name_or_path = model.config._name_or_path = arguments.description
    return model


def load_model(arguments: ModelArguments, device: torch.device) -> Any:
    """The model, with fresh LoRA adapters when asked for; only random weights are made on ``device`` at once."""
    if arguments.random_weights:
        model = empty_model(arguments, device)
    else:
        options: dict[str, Any] = {"dtype": arguments.dtype, "revision": arguments.model_revision}
        if arguments.attn_implementation is not None:
            options["attn_implementation"] = arguments.attn_implementation
        with _loading(arguments.model_name_or_path):
            model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, **options)
    return add_adapters(model, arguments)


def add_adapters(model: Any, arguments: ModelArguments) -> Any:
    """``model`` under fresh LoRA adapters, or as it is when none are asked for."""
    if arguments.lora_r is None:
        return model
    from peft import LoraConfig, get_peft_model

    targets: Any = arguments.lora_target_modules or "all-linear"
    return get_peft_model(
        model,
        LoraConfig(
            r=arguments.lora_r,
            lora_alpha=2 * arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=arguments.lora_modules_to_save,
            task_type="CAUSAL_LM",
        ),
    )


def _resume(config: MOPOConfig) -> str | bool | None:
    """``true``: the newest complete checkpoint, which must exist; ``auto``: if there is one; else a folder."""
    value = config.resume_from_checkpoint
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value == "auto":
        return last_complete_checkpoint(str(config.output_dir))
    return value


def _earlier_metrics(summary: Path) -> Any:
    """Those of the call that trained; None where there is no summary of it."""
    try:
        return json.loads(summary.read_text(encoding="utf-8")).get("train")
    except (OSError, ValueError):
        return None


def save_results(trainer: MOPOTrainer, output: TrainOutput, model_name: str) -> dict[str, Any]:
    """Evaluate on held-out data if there is any, save the model or adapter, and write and return the summary."""
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    path = Path(str(trainer.args.output_dir)) / SUMMARY_FILE
    solution = trainer.label_solution
    summary = {
        "model": model_name,
        "objectives": list(trainer.objectives),
        "primary": trainer.primary,
        "steps": output.global_step,
        "multiplier": trainer.multiplier,
        "threshold": trainer.dual.threshold,
        "in_sample": trainer.in_sample,
        "dual": None if trainer.measurement is None else asdict(trainer.measurement),
        "multiplier_on_labels": None if solution is None else solution.multiplier,
        "train": _earlier_metrics(path) if trainer.already_finished else output.metrics,
        "eval": metrics,
        "versions": {name: installed_version(name) for name in ("mopo-kernels", "torch", "transformers", "peft")},
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
    }
    if trainer.is_world_process_zero():
        write_atomically(path, json.dumps(summary, indent=2, default=str) + "\n")
        print(f"saved {trainer.args.output_dir} and {path}")
    return summary


def save_merged(trainer: MOPOTrainer) -> None:
    """The model with its adapters merged, in ``output_dir/merged``. The sum is rounded to the weights' dtype; the
    trainer's own model is used up."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(str(trainer.args.output_dir)) / "merged"
    card = model_card(trainer, merged=True)
    trainer.model.merge_and_unload().save_pretrained(folder)
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(folder)
    card.save(folder / "README.md")
    print(f"saved {folder}")


def train(argv: list[str]) -> None:
    """Run ``mopo train``: saves the model (or adapters) and ``training_summary.json`` in ``output_dir``.

    Args:
        argv: the arguments after ``train``.

    Raises:
        ValueError: a bad argument or value, thresholds that the training labels cannot meet, or bad data.
        SystemExit: 130 after Ctrl-C, 1 when training diverged or a threshold turned out impossible.
    """
    started = time.perf_counter()
    # transformers warns of names that it is about to change and that older releases, which are supported, still need.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model_arguments, data_arguments, config = parse(argv)
    backends.resolve(config.backend, config.device)
    set_seed(config.seed)
    if not model_arguments.random_weights:
        check_model_name(model_arguments.model_name_or_path)
    tokenizer = load_tokenizer(model_arguments)
    main_process = config.process_index == 0
    if model_arguments.random_weights and main_process:
        tokens = "its folder's tokenizer" if tokenizer.name_or_path else "a byte-level tokenizer"
        print(f"note: random weights and {tokens}{'' if data_arguments.is_given else ', trained on random data'}")
    train_data, eval_data = load_data(data_arguments, config, tokenizer)
    report = summarize(train_data)
    if main_process:
        print(f"{report.examples} examples, {report.pairs} pairs, objectives {', '.join(train_data.objectives)}")
        for message in report.messages:
            print(f"note: {message}")
    if model_arguments.dry_run:
        model = add_adapters(empty_model(model_arguments, torch.device("meta")), model_arguments)
        text = plan(model, config, tokenizer, train_data, eval_data)
        if main_process:
            print(f"plan for {model_arguments.description}; nothing is trained\n{text}")
        return
    if model_arguments.sweep is not None:
        train_sweep(
            model_arguments.sweep,
            config,
            partial(load_model, model_arguments, config.device),
            tokenizer,
            train_data,
            eval_data,
            save=partial(save_results, model_name=model_arguments.description),
            settings={name: value for name, value in vars(model_arguments).items() if name != "sweep"},
            started=started,
        )
        return
    try:
        trainer = MOPOTrainer(
            load_model(model_arguments, config.device),
            config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
        )
    except ThresholdError as error:
        raise ValueError(f"thresholds: {error}") from error
    if model_arguments.merge_adapters and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("merge_adapters: expected false with sharded weights; got true")
    try:
        output = trainer.train(resume_from_checkpoint=_resume(config))
    except TrainingInterrupted as error:
        if main_process:
            print(f"mopo: {error}", file=sys.stderr)
        raise SystemExit(130) from None
    except (ThresholdError, FloatingPointError) as error:
        if main_process:
            checkpoint = last_complete_checkpoint(str(config.output_dir))
            print(f"mopo: error: {error}; last checkpoint: {checkpoint or 'none'}", file=sys.stderr)
        raise SystemExit(1) from None
    save_results(trainer, output, model_arguments.description)
    if model_arguments.merge_adapters:
        save_merged(trainer)
