"""QLoRA: adapters over weights in 4 bits, on the CPU build of bitsandbytes where it is installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import yaml
from trainer_samples import make_data, make_model, make_tokenizer

from mopo_kernels import cli
from mopo_kernels.cli.train import load_model, parse, train
from mopo_kernels.trainer.reference_model import fingerprint

HAS_4BIT = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_data(8).save(folder / "train.jsonl")
    settings = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "thresholds": {"brief": 0.45},
        "tau": 0.5,
        "load_in_4bit": True,
        "lora_r": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def arguments(files, folder, *more):
    return ["--config", str(files / "config.yaml"), "--output_dir", str(folder), *more]


@pytest.mark.skipif(not HAS_4BIT, reason="needs bitsandbytes")
def test_adapters_train_over_weights_in_4_bits(files, tmp_path, capsys):
    from safetensors.torch import load_file

    kept = {}
    for rate in ("0.0", "1e-2"):
        train(arguments(files, tmp_path / rate, "--learning_rate", rate))
        kept[rate] = load_file(tmp_path / rate / "adapter_model.safetensors")
    lines = [line for line in capsys.readouterr().out.splitlines() if "'kl'" in line]
    assert all("'kl': '0'" in line for line in lines[:2])
    assert "'kl': '0'" not in lines[-1]
    assert any(not torch.equal(value, kept["0.0"][name]) for name, value in kept["1e-2"].items())
    assert "model, in 4 bits |" in (tmp_path / rate / "README.md").read_text()


@pytest.mark.skipif(not HAS_4BIT, reason="needs bitsandbytes")
def test_the_key_of_a_reference_file_covers_the_scales_of_weights_in_4_bits(files, tmp_path):
    """Weights that differ by a factor have the same codes."""
    found = []
    for factor in (1.0, 2.0):
        model = load_model(parse(arguments(files, tmp_path))[0], torch.device("cpu"))
        weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
        assert weight.dtype == torch.uint8
        weight.quant_state.offset.mul_(factor)
        found.append(fingerprint(model))
    assert found[0] != found[1]


def refused(files, folder, capsys, *more):
    assert cli.main(["train", *arguments(files, folder, *more)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_work_over_weights_in_4_bits_is_refused_before_anything_is_loaded(
    files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("mopo_kernels.cli.train.find_spec", lambda name: object())
    for option in ("merge_adapters", "dry_run", "random_weights"):
        more = ("--architecture", "llama") if option == "random_weights" else ()
        line = refused(files, tmp_path, capsys, f"--{option}", "true", *more)
        assert line.startswith(f"mopo: error: {option}: expected false with load_in_4bit, as ")
    config = yaml.safe_load((files / "config.yaml").read_text())
    del config["lora_r"]
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", "--config", str(tmp_path / "full.yaml"), "--output_dir", str(tmp_path)]) == 2
    assert "lora_r: expected a rank with load_in_4bit" in capsys.readouterr().err
    monkeypatch.setattr("mopo_kernels.cli.train.find_spec", lambda name: None)
    assert "load_in_4bit: expected bitsandbytes (pip install 'mopo-kernels[qlora]')" in refused(files, tmp_path, capsys)
