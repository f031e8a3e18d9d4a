"""``mopo train``: a configuration file, overridden by ``--key value``, to a trained policy."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    set_seed,
)
from transformers.trainer_utils import TrainOutput
from transformers.utils import find_adapter_config_file

from mopo_kernels import backends
from mopo_kernels.cli.plan import plan
from mopo_kernels.cli.sweep import train_sweep
from mopo_kernels.data import PreferenceData, load_preferences, summarize
from mopo_kernels.data.columns import parse_columns
from mopo_kernels.data.loaders import detect_format
from mopo_kernels.data.synthetic import byte_tokenizer, random_preferences
from mopo_kernels.dual import ThresholdError
from mopo_kernels.evaluation import is_adapter
from mopo_kernels.mappings import parse_json, parse_mapping
from mopo_kernels.text import one_line
from mopo_kernels.trainer import MOPOConfig, MOPOTrainer, TrainingInterrupted, last_complete_checkpoint
from mopo_kernels.trainer.checkpoint import WriteError, sole_run, write_atomically, writing
from mopo_kernels.trainer.lm_head import causal_lm
from mopo_kernels.trainer.model_card import installed_version, model_card
from mopo_kernels.trainer.rows import make_collator

SUMMARY_FILE = "training_summary.json"
# What random data is labelled for when no objectives are named.
RANDOM_OBJECTIVES = ["first", "second"]
MERGE_LATER = (
    "the sum would be rounded to 4 bits again (peft's AutoPeftModelForCausalLM loads output_dir on the model in full "
    "precision, and merge_and_unload merges there)"
)
# The name of a frozen adapter under the one that is trained.
_UNDER = "under"


@dataclass
class ModelArguments:
    """What is trained, and what comes of it."""

    model_name_or_path: str = field(
        default="",
        metadata={
            "help": "Folder or hub name of a causal language model, or of an adapter: it is trained further or, with "
            "lora_r, kept frozen under a new one. The policy as training starts is the reference."
        },
    )
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
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the weights under the adapters in 4 bits (NF4, by bitsandbytes)."}
    )
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
            if self.adapter is not None:
                raise ValueError(
                    f"random_weights: expected false with an adapter, which is trained further; {self.adapter} is one"
                )
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
        if self.sweep is not None and self.lora_r is None and self.adapter is None:
            raise ValueError("lora_r: expected a rank with sweep, which trains adapters on one frozen model; got none")
        if self.merge_adapters and self.lora_r is None and self.adapter is None:
            raise ValueError("lora_r: expected a rank with merge_adapters; got none")
        if self.load_in_4bit:
            self._check_4bit()
        if self.sweep is not None and (self.merge_adapters or self.dry_run):
            name = "merge_adapters" if self.merge_adapters else "dry_run"
            raise ValueError(f"{name}: expected false with sweep; got true")

    def _check_4bit(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "load_in_4bit: expected bitsandbytes (pip install 'mopo-kernels[qlora]') to be installed; it is not"
            )
        for name, why in (
            ("random_weights", "weights are quantised as they are loaded"),
            ("dry_run", "memory is estimated for weights that are not quantised"),
            ("merge_adapters", MERGE_LATER),
        ):
            if getattr(self, name):
                raise ValueError(f"{name}: expected false with load_in_4bit, as {why}; got true")
        if self.lora_r is None and self.adapter is None:
            raise ValueError("lora_r: expected a rank with load_in_4bit, whose weights cannot be trained; got none")

    @property
    def has_folder(self) -> bool:
        """Whether the model's configuration is in a local folder."""
        return bool(self.model_name_or_path) and (Path(self.model_name_or_path) / "config.json").is_file()

    @cached_property
    def adapter(self) -> str | None:
        """The adapter that training starts from, or None."""
        # A folder tells; for a name on the hub its files there do.
        if Path(self.model_name_or_path).is_dir():
            return self.model_name_or_path if is_adapter(self.model_name_or_path) else None
        if self.random_weights:
            return None
        check_model_name(self.model_name_or_path)
        with _loading(self.model_name_or_path):
            found = find_adapter_config_file(self.model_name_or_path, revision=self.model_revision)
        return None if found is None else self.model_name_or_path

    @cached_property
    def base(self) -> tuple[str, str | None]:
        """The model under it all, by folder or hub name, and its revision on the hub."""
        if self.adapter is None:
            return self.model_name_or_path, self.model_revision
        from peft import PeftConfig

        with _loading(self.adapter):
            config = PeftConfig.from_pretrained(self.adapter, revision=self.model_revision)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"model_name_or_path: expected an adapter_config.json with a base model; {self.adapter} names none"
            )
        return config.base_model_name_or_path, config.revision

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
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, of eval_file, or else of the training data's source."}
    )
    columns: dict | str | None = field(
        default=None, metadata={"help": "The rows' own names of columns: prompt=question,system=persona,..."}
    )
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
        if self.eval_split is not None and not self.is_given and self.eval_file is None:
            raise ValueError(f"eval_split: expected data with splits with it; got {self.eval_split!r} without")
        self.columns = parse_columns(self.columns)
        # A split of the file is one way with it.
        held = ["eval_file" if self.eval_file else "eval_split"] * bool(self.eval_file or self.eval_split) + [
            "eval_fraction"
        ] * (self.eval_fraction != 0)
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


def make_parser() -> HfArgumentParser:
    """The arguments of ``mopo train``, in three groups of dataclass fields."""
    parser = _Parser(
        (ModelArguments, DataArguments, MOPOConfig),  # type: ignore[arg-type]
        prog="mopo train",
        description="Train a policy under thresholds. Every key can stand in the file or on the command line.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Keys and values; the command line overrides them.")
    return parser


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, MOPOConfig]:
    """The three groups of arguments from ``[--config FILE.yaml] [--key value ...]``; the command line wins.

    Raises:
        ValueError: an unknown key, or a value or file that does not fit, by name.
    """
    parser = make_parser()
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

    source = arguments.train_file or arguments.dataset_name or ""

    def place(file: str, split: str | None) -> dict[str, Any]:
        part = {"name": arguments.dataset_config, "data_dir": arguments.dataset_dir} if file == source else {}
        return part | {"split": split, "max_rows": arguments.max_examples, "columns": arguments.columns}

    def read(file: str, split: str | None, format: str, objectives: list[str] | None) -> PreferenceData:
        return load_preferences(
            file,
            format=format,
            objectives=objectives,
            on_error=arguments.on_data_error,  # type: ignore[arg-type]
            **place(file, split),
            **parse_json("data_options", arguments.data_options),
        )

    def is_canonical(file: str, split: str | None) -> bool:
        named = arguments.data_format
        return (detect_format(file, **place(file, split)) if named == "auto" else named) == "canonical"

    def load(file: str, split: str | None) -> PreferenceData:
        wanted = config.objectives
        if not file:
            sizes: Any = arguments.random_data
            data = random_preferences(wanted or RANDOM_OBJECTIVES, seed=arguments.split_seed, **sizes)
        elif wanted is None or not is_canonical(file, split):
            data = read(file, split, arguments.data_format, wanted)
        else:
            # These rows name their own objectives, of which any choice can be trained on; load_preferences takes a name
            # that it was not given for a mistake.
            data = read(file, split, "canonical", None)
            if unknown := [name for name in wanted if name not in data.objectives]:
                raise ValueError(
                    f"objectives: expected names among {', '.join(data.objectives)}, which {file} has; "
                    f"got {', '.join(unknown)}"
                )
            data = PreferenceData.from_examples(data, wanted, data.skipped)
        if arguments.skip_overlong:
            data = data.drop_overlong(make_collator(config, tokenizer, data.objectives))
        return data

    train = load(source, arguments.train_split)
    if arguments.eval_file is not None:
        return train, load(arguments.eval_file, arguments.eval_split)
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
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model_name_or_path: {name} cannot be loaded: {' '.join(str(error).split())}") from error


def model_config(arguments: ModelArguments) -> Any:
    """The configuration of the model; with ``random_weights`` nothing is asked for over the network."""
    if not arguments.random_weights or arguments.has_folder:
        name, revision = arguments.base
        with _loading(name):
            return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
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


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The model's tokenizer; with random weights and no folder that has one, a byte each."""
    folder = Path(arguments.model_name_or_path)
    if not arguments.random_weights or (arguments.has_folder and _has_tokenizer(folder)):
        name, revision = arguments.model_name_or_path, arguments.model_revision
        if arguments.adapter is not None and not _has_tokenizer(Path(name)):
            name, revision = arguments.base
        with _loading(name):
            return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
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
    """The model with its adapters; only random weights are made on ``device`` at once."""
    if arguments.random_weights:
        model = empty_model(arguments, device)
    else:
        name, revision = arguments.base
        options: dict[str, Any] = {"dtype": arguments.dtype, "revision": revision, "trust_remote_code": False}
        if arguments.attn_implementation is not None:
            options["attn_implementation"] = arguments.attn_implementation
        if arguments.load_in_4bit:
            dtype = model_config(arguments).dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype or torch.float32,
            )
            options["device_map"] = {"": device}
        with _loading(name):
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    return add_adapters(model, arguments)


def add_adapters(model: Any, arguments: ModelArguments) -> Any:
    """``model`` under the adapter it is named by, or a fresh one, or that over the other, or as it is."""
    if arguments.adapter is None:
        return _with_fresh_adapter(model, arguments)
    from peft import PeftConfig, PeftModel, get_peft_model

    source: dict[str, Any] = {"revision": arguments.model_revision}
    with _loading(arguments.adapter):
        if model.device.type == "meta":
            config = PeftConfig.from_pretrained(arguments.adapter, **source)
            config.inference_mode = False
            model = get_peft_model(model, config)
        elif arguments.lora_r is None:
            return PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True, **source)
        else:
            model = _with_fresh_adapter(model, arguments)
            fresh = model.active_adapter
            model.load_adapter(arguments.adapter, adapter_name=_UNDER, is_trainable=False, **source)
            model.base_model.set_adapter([fresh, _UNDER])
            for name, parameter in model.named_parameters():
                if _UNDER in name.split("."):
                    parameter.requires_grad_(False)
    return model


def _with_fresh_adapter(model: Any, arguments: ModelArguments) -> Any:
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
    with trainer.as_configured():
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
        SystemExit: 128 and the signal's number after Ctrl-C (130), SIGTERM (143) and the like; 1 when training
            diverged, a threshold turned out impossible, or the disk is full.
    """
    started = time.perf_counter()
    # transformers warns of names that it is about to change and that older releases, which are supported, still need.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    model_arguments, data_arguments, config = parse(argv)
    alone = config.process_index == 0 and not model_arguments.dry_run
    with sole_run(Path(str(config.output_dir))) if alone else nullcontext():
        try:
            _train(model_arguments, data_arguments, config, started)
        except (WriteError, FloatingPointError) as error:
            if config.process_index == 0:
                print(f"mopo: error: {error}", file=sys.stderr)
            raise SystemExit(1) from None


def _train(model_arguments: ModelArguments, data_arguments: DataArguments, config: MOPOConfig, started: float) -> None:
    """What was parsed, done."""
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
        objectives = one_line(", ".join(train_data.objectives))
        print(f"{report.examples} examples, {report.pairs} pairs, objectives {objectives}")
        for message in report.messages:
            print(f"note: {one_line(message)}")
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
            settings={name: value for name, value in asdict(model_arguments).items() if name != "sweep"},
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
    if model_arguments.merge_adapters and getattr(causal_lm(trainer.model), "is_quantized", False):
        raise ValueError(f"merge_adapters: expected false with quantised weights, as {MERGE_LATER}; got true")
    if model_arguments.merge_adapters and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("merge_adapters: expected false with sharded weights; got true")
    try:
        output = trainer.train(resume_from_checkpoint=_resume(config))
    except TrainingInterrupted as error:
        if main_process:
            print(f"mopo: {error}", file=sys.stderr)
        raise SystemExit(128 + error.signal) from None
    except ThresholdError as error:
        if main_process:
            checkpoint = last_complete_checkpoint(str(config.output_dir))
            print(f"mopo: error: {error}; last checkpoint: {checkpoint or 'none'}", file=sys.stderr)
        raise SystemExit(1) from None
    save_results(trainer, output, model_arguments.description)
    if model_arguments.merge_adapters:
        folder = Path(str(config.output_dir))
        with writing("the merged policy", folder, lambda: f"the adapter is in {folder}"):
            save_merged(trainer)
