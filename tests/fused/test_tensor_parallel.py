"""A head that is a DTensor: the fused loss finds its group and rows, and a tensor-parallel model trains; 2 and 3 ranks.

Each launch does all cases of its number of ranks: starting processes (gloo, on the CPU) takes longer than the cases.
"""

from __future__ import annotations

import copy
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import ParallelismConfig  # type: ignore[import-untyped]
from samples import CPU_BACKENDS, Batch, make_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from trainer_samples import STEERED, VOCABULARY, lora, make_data, make_dual_data, make_trainer
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

from mopo_kernels import linear_logprob, linear_mopo_loss, linear_sequence_logprob

LIMIT = 150


def enter(rank: int, ranks: int, port: int) -> None:
    """What torchrun sets, so that accelerate and transformers find the ranks by themselves."""
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""},
    }
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def launch(ranks: int, work: Any, *arguments: Any) -> None:
    """``work(rank, ranks, port, *arguments)`` in every process; none outlives the time-out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(work, args=(ranks, port, *arguments), nprocs=ranks, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"not done after {LIMIT} s"
    finally:
        for process in context.processes:
            process.kill()


def leave() -> None:
    """When all are done, and without the interpreter's teardown, in which gloo's threads now and then abort."""
    dist.barrier()
    os._exit(0)


# ------------------------------------------------------------------------------------------------------ the functions


def spread(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(tensor.detach(), mesh, [Shard(0)])


def numbers(batch: Batch, mode: str, mesh: DeviceMesh | None, **options: Any) -> list[Tensor]:
    """What a call returns, and the gradients for hidden, weight and bias, gathered."""
    head = [tensor if mesh is None else spread(tensor, mesh) for tensor in (batch.weight, batch.bias)]
    leaves = [tensor.detach().requires_grad_() for tensor in (batch.hidden, *head)]
    hidden, weight, bias = leaves
    if mode == "logprob":
        value = linear_logprob(hidden, weight, batch.target, bias, softcap=4.0, **options)
        outputs, scalar = [value.detach()], (value * torch.linspace(-1, 2, value.shape[0], dtype=value.dtype)).sum()
    elif mode == "sequence":
        value = linear_sequence_logprob(hidden, weight, batch.target, batch.cu_seqlens, bias, **options)
        outputs, scalar = [value.detach()], value.square().sum()
    else:
        given = batch.loss_options("regression")
        if mode == "own reference":
            other = batch.weight * 0.9
            given |= {"ref_logprob": None, "ref_hidden": batch.hidden.detach() + 0.1}
            given |= {"ref_weight": other if mesh is None else spread(other, mesh)}
        output = linear_mopo_loss(
            *(hidden, weight, batch.target, batch.cu_seqlens, batch.pairs, batch.preference, batch.objective_weight),
            bias,
            **given,
            **options,
        )
        outputs, scalar = [output.loss.detach(), output.log_ratio, output.satisfaction], output.loss
    gradients = torch.autograd.grad(scalar, leaves)
    if mesh is not None:
        for gradient, leaf in zip(gradients[1:], leaves[1:], strict=True):
            assert isinstance(gradient, DTensor)
            assert isinstance(leaf, DTensor)
            assert (gradient.placements, gradient.device_mesh) == (leaf.placements, mesh)
    return [*outputs, *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)]


def check_functions(mesh: DeviceMesh) -> None:
    for mode in ("logprob", "sequence", "loss", "own reference"):
        expected = numbers(make_batch(dtype=torch.float64), mode, None, backend="torch")
        for backend in CPU_BACKENDS:
            got = numbers(make_batch(dtype=torch.float64), mode, mesh, backend=backend, max_buffer_bytes=24_000)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * b.abs().max().item(), equal_nan=True)
    filtered, exact = (
        numbers(make_batch(vocabulary=601, scale=2.0), "sequence", None, backend="torch", gradient_filter=share)
        for share in (0.01, None)
    )
    assert not torch.allclose(filtered[2], exact[2], rtol=1e-6)
    for backend in CPU_BACKENDS:
        got = numbers(make_batch(vocabulary=601, scale=2.0), "sequence", mesh, backend=backend, gradient_filter=0.01)
        for a, b in zip(got, filtered, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11 * b.abs().max().item())


def check_refusals(mesh: DeviceMesh) -> None:
    """Every rank is told, before it waits for the others."""
    batch, ranks = make_batch(), mesh.size()
    hidden, target, weight = batch.hidden, batch.target, spread(batch.weight, mesh)
    whole = weight.redistribute(placements=[Replicate()])
    across = distribute_tensor(batch.weight, mesh, [Shard(1)])
    other = dist.new_group(list(range(ranks)))
    backwards = DeviceMesh("cpu", list(reversed(range(ranks))))
    for expected, arguments, options in (
        (r"weight: expected a DTensor .*\(Shard\(0\),\).*; got \(Replicate\(\),\)", (hidden, whole, target), {}),
        (r"weight: expected a DTensor .*; got \(Shard\(dim=1\),\)", (hidden, across, target), {}),
        ("bias: expected a DTensor like the other part", (hidden, weight, target, batch.bias), {}),
        ("weight: expected a DTensor like", (hidden, batch.weight, target, spread(batch.bias, mesh)), {}),
        ("process_group: expected None or that of", (hidden, weight, target), {"process_group": other}),
        ("mesh whose ranks ascend; got", (hidden, spread(batch.weight, backwards), target), {}),
        (f"rows for each of {ranks} ranks", (hidden, spread(batch.weight[:1], mesh), target.clamp(max=0)), {}),
        ("hidden: expected a plain tensor", (spread(hidden, mesh), weight, target), {}),
    ):
        with pytest.raises(ValueError, match=expected):
            linear_logprob(*arguments, **options)
    given = batch.loss_options("regression") | {"ref_logprob": None, "ref_hidden": hidden, "ref_weight": weight}
    with pytest.raises(
        ValueError, match="ref_weight: expected a tensor cut over the ranks as weight is; got a DTensor"
    ):
        linear_mopo_loss(*batch.loss_arguments(), **given)


def functions(rank: int, ranks: int, port: int) -> None:
    enter(rank, ranks, port)
    mesh = init_device_mesh("cpu", (ranks,))
    check_functions(mesh)
    check_refusals(mesh)
    leave()


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_dtensor_head_gives_the_numbers_of_the_whole_head(ranks: int) -> None:
    """37 rows: 19 + 18, and 13 + 13 + 11."""
    launch(ranks, functions)


# -------------------------------------------------------------------------------------------------------- the trainer

# 6 heads divide among 2 and 3 ranks; the 64 rows of the head do not among 3.
SHAPE = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=6,
    tie_word_embeddings=False,
)


def seeded() -> Any:
    torch.manual_seed(0)
    # A copy: the Trainer and saving write into a model's configuration.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPE)).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def trained(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Three steps of four prompts, the gradients of one more, and what is logged."""
    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "optim": "sgd"}
    settings |= {"thresholds": {"brief": 0.55}, "on_infeasible": "warn", "initial_multiplier": {"brief": 0.2}}
    settings |= {"train_sampling_strategy": "sequential", "learning_rate": 1e-3, "eval_dataset": make_data(5, seed=9)}
    settings |= {"dual_dataset": make_dual_data(5), **STEERED}
    trainer = make_trainer(folder, model, make_data(8), **settings)
    trainer.train()
    data = trainer.train_dataset
    batch = trainer.data_collator([data[i] for i in range(4)])
    model.zero_grad()
    model(**batch, objective_weight=trainer.dual.weight)["loss"].backward()

    def whole(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    return {
        "weights": {name: whole(p) for name, p in model.named_parameters()},
        "gradients": {name: whole(p.grad) for name, p in model.named_parameters()},
        "dual": trainer.dual.state_dict(),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "eval": trainer.evaluate(),
        "ref_logprob": [example.ref_logprob for example in data],
    }


def trainers(rank: int, ranks: int, port: int, folder: str, expected: dict[str, Any]) -> None:
    enter(rank, ranks, port)
    # accelerate gives ranks that share their products the same batches, but on accelerators only, it says.
    ParallelismConfig._validate_accelerator = lambda *_: None
    path = Path(folder)
    for kind in ("plan", "hand"):
        if kind == "plan":
            config = DistributedConfig(tp_size=ranks)
            try:
                model = AutoModelForCausalLM.from_pretrained(path / "model", distributed_config=config)
            except ValueError as refusal:
                # Of an uneven cut, by the oldest transformers that are supported.
                if "must be divisible by the tensor parallel size" not in str(refusal):
                    raise
                continue
        else:
            # accelerate takes no such model; not told of the other ranks, it gives each the whole batch.
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                del os.environ[name]
            model = seeded()
            mesh = init_device_mesh("cpu", (ranks,))
            parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
        head = model.lm_head.weight
        assert isinstance(head, DTensor)
        assert head.placements == (Shard(0),)
        assert head.to_local().shape[0] == (64 + ranks - 1) // ranks - 2 * (rank == 2)
        found = trained(model, path / f"{kind}-{rank if kind == 'hand' else 0}")
        for part in ("gradients", "weights"):
            largest = max(float(value.abs().max()) for value in expected[part].values())
            for name, value in expected[part].items():
                error = float((found[part][name] - value).abs().max())
                assert error <= 1e-6 * largest, (kind, part, name, error, largest)
        assert found["dual"]["multiplier"] == pytest.approx(expected["dual"]["multiplier"], rel=1e-6)
        assert found["dual"]["multiplier"]["brief"] > 0
        for mine, line in zip(found["log"], expected["log"], strict=True):
            for key in ("loss", "kl", "effective_sample_size", "in_sample/satisfaction/helpful"):
                assert mine[key] == pytest.approx(line[key], rel=1e-5, abs=1e-7), (kind, key)
        for key, value in expected["eval"].items():
            if not any(word in key for word in ("runtime", "per_second", "preparation")):
                assert found["eval"][key] == pytest.approx(value, rel=1e-5, abs=1e-7), (kind, key)
        for mine, row in zip(found["ref_logprob"], expected["ref_logprob"], strict=True):
            assert mine == pytest.approx(row, rel=1e-6)
    with pytest.raises(ValueError, match="model: expected no adapter on an output head that is cut over ranks"):
        make_trainer(path / f"lora-{rank}", lora(model, target_modules=["lm_head"]))
    leave()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return trained(seeded(), tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_tensor_parallel_model_trains_as_one_process_does(ranks: int, one_process, tmp_path: Path) -> None:
    """transformers' own plan for every layer (DistributedConfig), and torch's parallelize_module for the head alone."""
    seeded().save_pretrained(tmp_path / "model")
    launch(ranks, trainers, str(tmp_path), one_process)
