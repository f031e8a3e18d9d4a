"""The reference: computed once into a file whatever interrupts it, and copies of weights in half the memory."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from torch import nn
from trainer_samples import (
    CONFIGS,
    WORDS,
    fresh,
    lora,
    make_config,
    make_data,
    make_model,
    make_tokenizer,
    make_trainer,
    same,
)
from transformers import AutoModelForCausalLM

from mopo_kernels.cli.train import parse, train
from mopo_kernels.data import PreferenceData, load_preferences
from mopo_kernels.trainer import MOPOTrainer, reference_cache
from mopo_kernels.trainer.batch_layout import take_layout
from mopo_kernels.trainer.checkpoint import STATE_FILE
from mopo_kernels.trainer.forward import PolicyForward
from mopo_kernels.trainer.reference_model import copy_parameters, parameters_as

# What a process of its own needs to import this file.
PATHS = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]
PROMPTS, A_BATCH, BATCHES = 23, 2, 12  # the last batch has one prompt; 8 batches a write


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same number of threads as in a killed process: the order of sums is part of a bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes(monkeypatch):
    """Responses of each batch that a reference was run on."""
    sizes = []
    run = PolicyForward.reference_logprob

    def counted(*args, **kwargs):
        result = run(*args, **kwargs)
        sizes.append(len(result[0]))
        return result

    monkeypatch.setattr(PolicyForward, "reference_logprob", counted)
    return sizes


def prepared(folder, model=None, data=None, tokenizer=None, **changes):
    """A trainer whose reference is computed; by default kept in FOLDER/refs."""
    settings = {
        "reference": "precomputed",
        "reference_path": str(folder / "refs"),
        "per_device_eval_batch_size": A_BATCH,
    }
    trainer = MOPOTrainer(
        model or make_model(),
        make_config(folder / "run", **{**settings, **changes}),
        train_dataset=data or make_data(PROMPTS),
        processing_class=tokenizer or make_tokenizer(),
    )
    trainer._prepare_references()
    return trainer


def values(trainer):
    return [example.ref_logprob for example in trainer.train_dataset]


def files(folder):
    return sorted((folder / "refs").glob("reference-*.logprob"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed pass: its file."""
    folder = tmp_path_factory.mktemp("whole")
    prepared(folder)
    (file,) = files(folder)
    assert list(file.parent.iterdir()) == [file], "nothing else is left"
    return file


# -------------------------------------------------------------------------------------------------- computed once


def test_runs_that_differ_in_anything_else_share_one_file(tmp_path, passes):
    first = prepared(tmp_path)
    assert len(passes) == BATCHES
    labelled = [replace(example, weight=2.0, pairs=example.pairs[:1]) for example in make_data(PROMPTS)]
    for model, changes in (
        (make_model(), {"tau": 0.1, "thresholds": {"brief": 0.3}, "seed": 7, "loss_type": "sigmoid", "max_steps": 9}),
        (
            make_model(),
            {"data": PreferenceData.from_examples(labelled, ["brief", "helpful"]), "length_normalize": True},
        ),
        (make_model(), {"per_device_eval_batch_size": 5, "shared_prompts": "never"}),
        (fresh(lora(make_model())), {}),
        (fresh(lora(make_model(), target_modules=["o_proj"], modules_to_save=["lm_head"])), {}),
    ):
        assert values(prepared(tmp_path, model, **changes)) == values(first)
    assert len(passes) == BATCHES
    assert len(files(tmp_path)) == 1


def one_number_changed():
    """A sample of each matrix would miss it."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[13, 7] += 1e-2
    return {"model": model}


def other_rotary_base():
    model = make_model()
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    other = AutoModelForCausalLM.from_config(config)
    other.load_state_dict(model.state_dict())
    return {"model": other}


def one_response_changed():
    examples = list(make_data(PROMPTS))
    examples[20] = replace(examples[20], responses=("w1 w1 w1", *examples[20].responses[1:]))
    return {"data": PreferenceData.from_examples(examples, ["helpful", "brief"])}


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return {"tokenizer": tokenizer, "chat": "always"}


TEMPLATE = "{% for message in messages %}w5 {{ message['content'] }} {% endfor %}"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (one_number_changed, "another model"),
        (other_rotary_base, "another model configuration"),
        (one_response_changed, "other data"),
        (lambda: with_template(TEMPLATE), "another tokenizer"),
        (lambda: {"max_length": 64}, "max_length None"),
        (lambda: {"bf16": True}, "mixed_precision no"),
        (lambda: {"model": make_model(dtype=torch.bfloat16)}, "another model, dtype float32"),
    ],
    ids=["weight", "rotary base", "response", "template", "length limit", "mixed precision", "dtype"],
)
def test_what_the_numbers_depend_on_is_computed_anew_beside_and_refused_at_a_given_file(
    change, differs, whole, tmp_path
):
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / whole.name).write_bytes(whole.read_bytes())
    changed = values(prepared(tmp_path, **change()))
    assert len(files(tmp_path)) == 2
    stored = [tuple(json.loads(line)[1]) for line in whole.read_text().splitlines()[1:]]
    assert (changed == stored) == ("max_length" in differs)
    with pytest.raises(ValueError, match=r"^reference_path: expected this run's reference log-prob") as caught:
        prepared(tmp_path, reference_path=str(whole), **change())
    match = re.search(r"got those of (.*) \(name another file", str(caught.value))
    assert match is not None
    assert match[1] == differs
    # Under its own name, too, a file is taken only for what it says it is.
    (other,) = [file for file in files(tmp_path) if file.name != whole.name]
    other.write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=f"got those of {differs} "):
        prepared(tmp_path, **change())


def test_a_template_that_writes_todays_date_is_another_tokenizer_tomorrow(tmp_path, monkeypatch, passes):
    template = "w{{ strftime_now('%d') | int }} " + TEMPLATE
    for day, computed in ((3, 1), (3, 1), (4, 2)):
        today = datetime.datetime(2025, 5, day)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda t=today: t))
        prepared(tmp_path, **with_template(template))
        assert len(files(tmp_path)) == computed
    assert len(passes) == 2 * BATCHES


def test_a_tokenizer_that_was_used_is_the_same_tokenizer(tmp_path, passes):
    tokenizer = make_tokenizer()
    prepared(tmp_path, tokenizer=tokenizer)
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=1)
    prepared(tmp_path, tokenizer=tokenizer)
    assert len(passes) == BATCHES


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda lines: b"".join(lines[:-1]), "those of 22 of 23 examples"),
        (lambda lines: b"".join(lines)[:-3], "those of 22 of 23 examples"),
        (lambda lines: b"".join(lines[:-1]) + b"[99, [-1.0]]\n", "those of 22 of 23 examples"),
        (lambda lines: b"".join(lines[:-1]) + b"[22, null]\n", "those of 22 of 23 examples"),
        (lambda lines: b"".join(lines[:-1]) + b"[[22], [-1.0]]\n", "those of 22 of 23 examples"),
        (lambda lines: b"prompt,response\n", "something else"),
        (lambda lines: b'{"prompt": "w1"}\n', "something else"),
        (lambda lines: b"", "something else"),
        (lambda lines: b"\xff\x00", "something else"),
    ],
    ids=["short", "torn", "index", "null", "list", "text", "data", "empty", "binary"],
)
def test_a_damaged_or_foreign_file_is_refused(content, found, whole, tmp_path):
    file = tmp_path / "mine.logprob"
    file.write_bytes(content(whole.read_bytes().splitlines(keepends=True)))
    with pytest.raises(ValueError, match=rf"in .*mine\.logprob; got {found} \(name"):
        prepared(tmp_path, reference_path=str(file))


def test_a_named_file_is_the_training_datas_and_held_out_data_has_its_own_beside_it(tmp_path, passes):
    file = tmp_path / "refs" / "mine.logprob"
    for _ in range(2):
        trainer = make_trainer(
            tmp_path / "run", reference="precomputed", reference_path=str(file), eval_dataset=make_data(3, seed=9)
        )
        trainer._prepare_references()
        assert all(example.ref_logprob is not None for example in trainer.eval_dataset)
    assert file.is_file()
    assert len(files(tmp_path)) == 1
    assert len(passes) == 3 + 1


def test_without_a_path_the_file_is_kept_in_the_output_folder(tmp_path):
    prepared(tmp_path, reference_path=None)
    assert len(list((tmp_path / "run").glob("reference-*.logprob"))) == 1


def test_given_log_probabilities_are_kept_and_only_missing_ones_computed(tmp_path, passes):
    given = make_data(PROMPTS).with_ref_logprob(
        [[-float(index)] * len(e.responses) for index, e in enumerate(make_data(PROMPTS))]
    )
    trainer = prepared(tmp_path, data=given)
    assert passes == []
    assert not (tmp_path / "refs").exists()
    assert values(trainer) == [example.ref_logprob for example in given]
    # 7, 8 and 19 have none.
    some = [replace(e, ref_logprob=None) if index in (7, 8, 19) else e for index, e in enumerate(given)]
    full = values(prepared(tmp_path / "all"))
    passes.clear()
    trainer = prepared(tmp_path, data=PreferenceData.from_examples(some, given.objectives))
    assert sum(passes) == sum(len(some[index].responses) for index in (7, 8, 19))
    for index, (found, example) in enumerate(zip(values(trainer), given, strict=True)):
        assert found == (pytest.approx(full[index]) if index in (7, 8, 19) else example.ref_logprob)


def test_where_the_folder_cannot_be_written_its_file_is_read_or_one_kept_in_the_output_folder(
    whole, tmp_path, monkeypatch, caplog, passes
):
    read_only = tmp_path / "refs"
    read_only.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != read_only and allowed(path, mode))
    prepared(tmp_path)
    assert len(list((tmp_path / "run").glob("reference-*.logprob"))) == 1
    assert caplog.text.count(f"{read_only} cannot be written: reference log-probabilities are kept in") == 1
    assert len(passes) == BATCHES
    (read_only / whole.name).write_bytes(whole.read_bytes())
    (tmp_path / "run" / whole.name).unlink()
    prepared(tmp_path)
    assert len(passes) == BATCHES


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "refs").write_text("")
    with pytest.raises(ValueError, match=r"^reference_path: cannot use .*refs/mine\.logprob: "):
        prepared(tmp_path, reference_path=str(tmp_path / "refs" / "mine.logprob"))
    (tmp_path / "mine.logprob").mkdir()
    with pytest.raises(ValueError, match=r"^reference_path: expected a file, as its name ends in .*a folder"):
        prepared(tmp_path, reference_path=str(tmp_path / "mine.logprob"))


def test_a_log_probability_that_is_not_finite_is_refused_and_not_kept(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index("w20") + 3] = float("nan")
    with pytest.raises(ValueError, match=r"^model: expected finite log-probabilities of .* under the reference; got"):
        prepared(tmp_path, model)
    assert files(tmp_path) == []
    assert "NaN" not in next((tmp_path / "refs").glob(".*.partial")).read_text()


# -------------------------------------------------------------------------------------------------- interruption

KILLED = """
import os, signal, sys
sys.path[:0] = {paths}
import torch
from pathlib import Path
from test_reference import prepared
from mopo_kernels.trainer.forward import PolicyForward

torch.set_num_threads(1)
run, left = PolicyForward.reference_logprob, [{batches}]

def mortal(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(*args, **kwargs)

PolicyForward.reference_logprob = mortal
prepared(Path({folder!r}))
"""


def test_a_pass_that_is_killed_keeps_what_it_has_and_ends_as_if_undisturbed(whole, tmp_path, passes):
    """SIGKILL before the 11th batch of 12: the first 8 had been written."""
    script = KILLED.format(paths=PATHS, batches=10, folder=str(tmp_path))
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert files(tmp_path) == []
    (partial,) = (tmp_path / "refs").glob(".*.partial")
    assert len(partial.read_bytes().splitlines()) == 1 + 8 * A_BATCH
    prepared(tmp_path)
    assert len(passes) == BATCHES - 8
    (file,) = files(tmp_path)
    assert file.name == whole.name
    assert file.read_bytes() == whole.read_bytes()
    assert list(file.parent.iterdir()) == [file], "nothing else is left"


@pytest.mark.parametrize(
    ("left", "missing"),
    [
        (lambda content, ends: b"", 12),
        (lambda content, ends: content[:50], 12),
        (lambda content, ends: content[: ends[0]], 12),
        (lambda content, ends: content[: ends[5]], 10),
        (lambda content, ends: content[: ends[5] + 7], 10),
        (lambda content, ends: content[: ends[6] - 1], 10),
        (lambda content, ends: content[: ends[6]], 9),
        (lambda content, ends: content[: ends[5]] + b"\x00" * 80 + content[ends[6] :], 10),
        (lambda content, ends: content[: ends[5]] + b"17\n" + content[ends[6] :], 10),
        (lambda content, ends: content[:-1], 1),
        (lambda content, ends: content, 0),
        (lambda content, ends: content.replace(b'"truncate": false', b'"truncate": true'), 12),
    ],
    ids=[
        *("nothing", "half the first line", "no row", "whole rows", "a torn row", "no end of line", "whole batches"),
        *("a hole", "no row in a row", "all but an end of line", "everything", "of something else"),
    ],
)
def test_what_a_crash_leaves_is_used_as_far_as_it_is_sound(left, missing, whole, tmp_path, passes):
    content = whole.read_bytes()
    ends = [match.end() for match in re.finditer(rb"\n", content)]
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / f".{whole.name}.partial").write_bytes(left(content, ends))
    prepared(tmp_path)
    assert len(passes) == missing
    (file,) = files(tmp_path)
    rows = dict(json.loads(line)[:2] for line in file.read_bytes().splitlines()[1:])
    assert rows == dict(json.loads(line)[:2] for line in content.splitlines()[1:])
    assert list(file.parent.iterdir()) == [file]


def test_of_two_at_once_one_computes_and_the_other_waits_for_it(tmp_path, monkeypatch, caplog, passes):
    monkeypatch.setattr(reference_cache, "_WAIT_SECONDS", 0.01)
    run, begun, go = PolicyForward.reference_logprob, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return run(*args, **kwargs)

    monkeypatch.setattr(PolicyForward, "reference_logprob", slow)
    found = {}
    first, second = (
        threading.Thread(target=lambda name=name: found.update({name: values(prepared(tmp_path))})) for name in "ab"
    )
    first.start()
    assert begun.wait(60)
    second.start()
    while "another process is computing" not in caplog.text:
        second.join(0.01)
    go.set()
    first.join(60)
    second.join(60)
    assert found["a"] == found["b"]
    assert len(passes) == BATCHES
    assert caplog.text.count("waiting for it") == 1
    assert list((tmp_path / "refs").iterdir()) == files(tmp_path), "nothing else is left"
    assert len(files(tmp_path)) == 1


def test_a_process_that_waited_for_one_that_died_goes_on_from_what_that_left(whole, tmp_path, monkeypatch, passes):
    monkeypatch.setattr(reference_cache, "_WAIT_SECONDS", 0.01)
    refs = tmp_path / "refs"
    refs.mkdir()
    lock = FileLock(refs / f".{whole.name}.lock")
    lock.acquire()
    thread = threading.Thread(target=lambda: prepared(tmp_path))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    assert passes == []
    content = whole.read_bytes()
    (refs / f".{whole.name}.partial").write_bytes(content[: content.index(b"\n[18,") + 1])
    lock.release()
    thread.join(60)
    assert len(passes) == BATCHES - 9
    assert (refs / whole.name).read_bytes() == content


RANKS = """
import os, sys
sys.path[:0] = {paths}
import torch
import torch.distributed as dist
from pathlib import Path
from test_reference import one_response_changed, prepared, values
from mopo_kernels.trainer.forward import PolicyForward

torch.set_num_threads(1)
folder = Path({folder!r})
run, mine = PolicyForward.reference_logprob, []

def counted(*args, **kwargs):
    mine.append(1)
    return run(*args, **kwargs)

PolicyForward.reference_logprob = counted
result = {{"values": values(prepared(folder / "resumed")), "passes": len(mine)}}
result["again"] = values(prepared(folder / "resumed"))
assert len(mine) == result["passes"]
result["afresh"] = values(prepared(folder / "afresh"))
try:
    prepared(folder / "refused", reference_path={file!r}, **one_response_changed())
except ValueError as error:
    result["error"] = str(error)
torch.save(result, folder / f"rank{{dist.get_rank()}}.pt")
dist.barrier()
os._exit(0)
"""


def test_ranks_share_what_is_missing_and_agree_on_everything(whole, tmp_path):
    """Two ranks go on from 5 of 12 batches, read the file, compute all, and both refuse another data set's."""
    content = whole.read_bytes()
    refs = tmp_path / "resumed" / "refs"
    refs.mkdir(parents=True)
    (refs / f".{whole.name}.partial").write_bytes(content[: content.index(b"\n[10,") + 1])
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(paths=PATHS, folder=str(tmp_path), file=str(whole)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            _, errors = child.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            child.terminate()
            raise
    assert child.returncode == 0, errors[-4000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    expected = [tuple(json.loads(line)[1]) for line in content.splitlines()[1:]]
    for rank in ranks:
        assert rank["values"] == rank["again"] == rank["afresh"] == expected, "bit for bit, on any number of ranks"
        assert "got those of other data" in rank["error"]
    assert [rank["passes"] for rank in ranks] == [4, 3]
    assert (refs / whole.name).is_file()


# -------------------------------------------------------------------------------------------------- mopo train


@pytest.fixture
def run_files(tmp_path):
    folder = tmp_path / "data"
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_data(12).save(folder / "train.jsonl")
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "train_file": str(folder / "train.jsonl"),
        "reference": "precomputed",
        "thresholds": {"brief": 0.45},
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_a_second_mopo_train_on_the_same_file_computes_nothing(run_files, passes):
    config = ["--config", str(run_files / "config.yaml")]
    counts = []
    for number, more in enumerate(([], ["--tau", "0.3", "--seed", "5"], ["--train_file", str(run_files / "data")])):
        train([*config, "--output_dir", str(run_files / f"run{number}"), *more])
        # One call of the training step itself, which takes what the data has.
        counts.append(len(passes))
        passes.clear()
    assert counts == [3, 1, 1]
    assert len(list((run_files / "data").glob("reference-*.logprob"))) == 1
    assert len(load_preferences(run_files / "data")) == 12, "a folder of data is still one"


def test_mopo_train_keeps_the_reference_beside_local_data_and_a_path_that_is_given(run_files):
    config = ["--config", str(run_files / "config.yaml"), "--output_dir", str(run_files / "run")]
    data = run_files / "data"
    for more, expected in (
        ([], str(data)),
        (["--train_file", str(data)], str(data)),
        (["--reference_path", "elsewhere"], "elsewhere"),
        (["--train_file", "some-organisation/some-data"], None),
    ):
        assert parse([*config, *more])[2].reference_path == expected


# -------------------------------------------------------------------------------------------------- copies of weights


def moved(model, scale=0.05):
    """Another policy than at the start, so that a live weight in place of a kept one shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.device))


def with_copy(folder, model, **changes):
    """A trainer that keeps a copy of the starting weights, and a batch without log-probabilities."""
    trainer = make_trainer(folder, model, reference="model", **changes)
    return trainer, trainer.data_collator([trainer.train_dataset[index] for index in range(8)])


def first_reference(trainer, batch):
    with torch.no_grad():
        return trainer.model(**batch, reference_only=True)["ref_logprob"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rounded_copy_is_the_model_with_rounded_weights_whatever_the_policy_is(name, tmp_path):
    model = make_model(name)
    trainer, batch = with_copy(tmp_path, model, reference_dtype="bfloat16")
    kept = trainer.reference.initial
    moved(model)
    live = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = first_reference(trainer, batch)
    same(live, {n: p.detach() for n, p in model.named_parameters()})

    trainer.reference.initial, trainer.reference.untrained = None, True
    assert not torch.allclose(first_reference(trainer, batch), found, atol=0.1), "that of the live weights"
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            parameter.copy_(kept[n])
    assert torch.equal(first_reference(trainer, batch), found)


def test_a_bfloat16_copy_has_half_the_bytes_of_what_is_multiplied(tmp_path):
    model = make_model("llama-tied")
    copies = copy_parameters(model, torch.bfloat16)
    assert {n for n, value in copies.items() if value.dtype == torch.float32} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        *(f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")),
    }
    assert all(value.dtype in (torch.float32, torch.bfloat16) for value in copies.values())
    assert all(torch.equal(copies[n].float(), p.to(copies[n].dtype).float()) for n, p in model.named_parameters())
    assert len(copies) == len(list(model.parameters()))


def test_what_a_bfloat16_copy_costs(tmp_path):
    """In fp32 0.002 nats times the root of the tokens on this model, under bf16 autocast nothing at all."""
    found: dict[Any, torch.Tensor] = {}
    for dtype in ("auto", "bfloat16"):
        trainer, batch = with_copy(tmp_path, make_model(), reference_dtype=dtype)
        moved(trainer.model)
        found[dtype] = first_reference(trainer, batch)
        with torch.autocast("cpu", torch.bfloat16):
            found[dtype, "autocast"] = first_reference(trainer, batch)
    tokens = torch.tensor([len(r.split()) + 1.0 for e in make_data() for r in e.responses])
    a_root = ((found["bfloat16"] - found["auto"]).square() / tokens).mean().sqrt()
    autocast = ((found["auto", "autocast"] - found["auto"]).square() / tokens).mean().sqrt()
    assert 5e-4 < a_root < 1e-2
    assert a_root < autocast
    assert torch.equal(found["bfloat16", "autocast"], found["auto", "autocast"])


def test_a_copy_in_another_place_is_on_the_device_a_block_at_a_time(tmp_path):
    trainer, batch = with_copy(tmp_path, make_model(), reference_dtype="bfloat16")
    model = trainer.model
    blocks = list(model.model.layers)
    live = {n: p.data_ptr() for n, p in model.named_parameters()}
    seen = []

    def exchanged(module, *_):
        seen.append({n for n, p in model.named_parameters() if p.data_ptr() != live[n]})

    handles = [block.mlp.register_forward_hook(exchanged) for block in blocks]
    first_reference(trainer, batch)
    for handle in handles:
        handle.remove()
    always = {"lm_head.weight"}
    of_block = [
        {f"model.layers.{i}.{n}.weight" for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        for i, block in enumerate(blocks)
    ]
    # Vectors and the embedding have their own dtype: the copy itself takes their place.
    kept = {n for n, value in trainer.reference.initial.items() if value.dtype == torch.float32}
    assert seen == [names | always | kept for names in of_block]


def test_weights_are_the_policys_again_when_the_reference_pass_fails(tmp_path):
    trainer, batch = with_copy(tmp_path, make_model(), reference_dtype="bfloat16")
    model = trainer.model
    live = {n: p.data_ptr() for n, p in model.named_parameters()}

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        first_reference(trainer, batch)
    handle.remove()
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == live
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)
    assert torch.is_autocast_cache_enabled()


class Twice(nn.Module):
    """A block that runs two times, and one whose weight the model uses outside it too."""

    def __init__(self):
        super().__init__()
        model = make_model()
        self.block, self.other = model.model.layers
        self.shared = self.other.mlp.up_proj.weight

    def forward(self):
        pass


def test_weights_that_several_parts_use_are_exchanged_for_the_whole_pass():
    model = Twice()
    values = copy_parameters(model, torch.bfloat16)
    live = model.shared.data_ptr()
    with parameters_as(model, values):
        assert model.shared.data_ptr() != live
        assert model.block.mlp.up_proj.weight.data_ptr() not in (0, model.shared.data_ptr())
    assert model.shared.data_ptr() == live


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_under_autocast_the_policy_does_not_get_the_weights_of_its_reference(kind, tmp_path):
    """Autocast keeps the casts of weights for as long as a forward pass lasts, which has both models in it."""
    model = make_model() if kind == "full" else lora(make_model())
    trainer, batch = with_copy(tmp_path, model, bf16=True, reference_update_steps=1, max_steps=3)
    trainer.train()
    trainer.reference.update(model)
    moved(model)
    policy = model._mopo_policy

    def lagged():
        with torch.no_grad():
            return policy.reference_logprob(model, take_layout(dict(tokens)), None)[1]

    def own():
        with torch.no_grad():
            return policy.sequence_logprob(model, take_layout(dict(tokens)))

    others = ("pairs", "preference", "pair_weight", "prompt_index", "ref_logprob")
    tokens = {name: value for name, value in batch.items() if name not in others}
    with torch.autocast("cpu", torch.bfloat16):
        together = lagged(), own(), lagged()
    apart = []
    for run in (lagged, own, lagged):
        with torch.autocast("cpu", torch.bfloat16):
            apart.append(run())
    same(list(together), apart)
    assert not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("changes", [{"reference_dtype": "bfloat16"}, {"reference_offload": True}], ids=str)
def test_a_resumed_run_has_its_lagged_reference_bit_for_bit(changes, tmp_path):
    settings = {"reference_update_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **changes}
    settings |= {"reference": "precomputed", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path, **settings)
    whole.train()
    state = torch.load(tmp_path / "checkpoint-3" / STATE_FILE, weights_only=True)
    rounded = {value.dtype for value in state["snapshot"].values()} == {torch.float32, torch.bfloat16}
    assert rounded == ("reference_dtype" in changes)
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()), "weights")
    same(whole.dual.state_dict(), resumed.dual.state_dict(), "dual")
    same(whole.reference.snapshot, resumed.reference.snapshot, "reference")
    # The reference matters to the run: that of fp32 weights leads elsewhere.
    if rounded:
        exact = make_trainer(tmp_path / "exact", **{**settings, "reference_dtype": "auto"})
        exact.train()
        assert not torch.equal(exact.model.lm_head.weight, whole.model.lm_head.weight)


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reference_dtype: expected one of auto, bfloat16; got 'float16'"):
        make_config(tmp_path, reference_dtype="float16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_an_offloaded_copy_is_pinned_on_the_cpu_and_gives_the_same_numbers(tmp_path):
    found = []
    for offload in (False, True):
        trainer, batch = with_copy(tmp_path, make_model(), use_cpu=False, reference_offload=offload)
        moved(trainer.model)
        assert {value.device.type for value in trainer.reference.initial.values()} == {"cpu" if offload else "cuda"}
        assert all(value.is_pinned() == offload for value in trainer.reference.initial.values())
        found.append(first_reference(trainer, {name: value.cuda() for name, value in batch.items()}))
    assert torch.equal(*found)
