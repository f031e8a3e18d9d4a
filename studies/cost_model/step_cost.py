"""Plans past the machines at hand: products, communication and memory of a step, by model, engine and devices.

    python -m studies.cost_model             # prints the tables, and rewrites them in docs/scaling.md
    python -m studies.cost_model --measure   # measures here before, on one and two processes: measured_cpu.json

Equation numbers are those of docs/scaling.md, where what each term leaves out is said as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PretrainedConfig

from bench.provenance import ROOT, provenance
from bench.tables import fill_marks
from mopo_kernels.fused.buffer_plan import default_buffer_bytes
from mopo_kernels.trainer.memory_estimate import optimizer_bytes, tensor_bytes

DOCUMENT = ROOT / "docs" / "scaling.md"
RECORD = Path(__file__).with_name("measured_cpu.json")
COUNTS = (1, 2, 8, 64, 1024)
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Device:
    """Figures of the vendor's data sheets; ``efficiency`` is an assumption."""

    name: str = "NVIDIA H100 SXM"
    flops: float = 989e12  # bf16, dense: H100 data sheet (1,979 with sparsity)
    memory: float = 80e9  # bytes: the same
    node: int = 8  # devices on one NVLink switch: DGX H100 data sheet
    fast: float = 450e9  # bytes/s each way over NVLink (900 GB/s both): H100 data sheet
    slow: float = 50e9  # bytes/s each way between nodes, a 400 Gb/s ConnectX-7 a device: DGX H100 data sheet
    efficiency: float = 0.4  # share of flops that large products reach in a training step: assumed

    def bandwidth(self, devices: int) -> float:
        return self.fast if devices <= self.node else self.slow


@dataclass(frozen=True)
class Work:
    """What a data rank does in a step: prompts of so many tokens, each laid out once with its n responses."""

    prompts: int = 8
    prompt: int = 256
    responses: int = 4
    response: int = 192

    @property
    def tokens(self) -> int:
        """N, of the backbone."""
        return self.prompts * (self.prompt + self.responses * self.response)

    @property
    def scored(self) -> int:
        """N', rows of the head."""
        return self.prompts * self.responses * self.response

    @property
    def attended(self) -> float:
        """A: pairs of a token and one it sees."""
        own = self.prompt**2 / 2 + self.responses * (self.response * self.prompt + self.response**2 / 2)
        return self.prompts * own


@dataclass(frozen=True)
class Model:
    """Sizes of a model, in numbers; ``adapters`` are those of LoRA on every linear layer of a block."""

    name: str
    layers: int
    hidden: int
    vocabulary: int
    block: int
    adapters: int
    kept: float  # bytes that a block keeps for its backward, a token, in bf16
    total: int

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden


LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)
CONFIGS: dict[str, PretrainedConfig] = {
    "Phi 1.4B": PhiConfig(),
    "Llama 7B": LlamaConfig(),
    "Llama 13B": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40
    ),
    "Llama 70B": LLAMA_70B,
}
RANK = 16


def on_meta(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@functools.cache
def sizes(name: str) -> Model:
    return sizes_of(CONFIGS[name], name)


def kept_bytes(model: Any, tokens: int = 8) -> float:
    """Bytes that a block keeps for backward, a token: the difference that one more makes, each storage counted once.

    Few tokens, as attention without storage keeps its scores, which blockwise kernels do not.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    blocks = model.base_model.layers
    totals = []
    for count in (1, 2):
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        model.base_model.layers = blocks[:count]
        rows = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
        # A mask with four dimensions is used as it is; others are looked into, which a tensor without storage forbids.
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=model.device).tril()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.base_model(input_ids=rows, attention_mask=mask, use_cache=False)
        totals.append(sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights))
    model.base_model.layers = blocks
    return (totals[1] - totals[0]) / tokens


def sizes_of(config: PretrainedConfig, name: str) -> Model:
    """Counted on the model itself, without its weights."""
    model = on_meta(config)
    block = model.base_model.layers[0]
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return Model(
        name,
        layers=len(model.base_model.layers),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        block=sum(p.numel() for p in block.parameters()),
        adapters=sum(RANK * (module.in_features + module.out_features) for module in linear),
        kept=kept_bytes(model),
        total=sum(p.numel() for p in model.parameters()),
    )


@dataclass(frozen=True)
class Plan:
    """A way to train: ``shards`` devices share the parameters, ``cut`` devices every product and the head's rows."""

    engine: str
    lora: bool
    devices: int
    weight: int = BF16  # bytes of a weight

    @property
    def number(self) -> int:
        """Bytes of a trained number: adapters are fp32."""
        return FP32 if self.lora else self.weight

    @property
    def cut(self) -> int:
        return min(8, self.devices) if self.engine == "FSDP2 + vocabulary-parallel" else 1

    @property
    def shards(self) -> int:
        return 1 if self.engine == "DDP" else self.devices

    @property
    def ranks(self) -> int:
        """Devices with a batch of their own, or a part of it: what gradients are averaged over."""
        return self.devices // self.cut


ENGINES = ("DDP", "FSDP2", "FSDP2 + vocabulary-parallel")


def trained(model: Model, lora: bool) -> int:
    return model.layers * model.adapters if lora else model.total


def products(model: Model, work: Work, plan: Plan) -> float:
    """Eqs. (1) and (2): floating-point operations of a step on a device, blocks recomputed in backward."""
    through_blocks = work.tokens * model.layers * model.block * (3 if plan.lora else 4)
    through_adapters = work.tokens * trained(model, True) * 4 if plan.lora else 0
    times = 2 if plan.lora else 4 if plan.cut > 1 else 3
    through_head = times * work.scored * model.head
    attention = 4.5 * 2 * work.attended * model.layers * model.hidden
    return 2 * (through_blocks + through_adapters + through_head + attention) / plan.cut


def gradient_traffic(model: Model, plan: Plan) -> float:
    """Eq. (3): bytes that a device sends in a step for parameters and gradients."""
    gradients = trained(model, plan.lora) * plan.number / plan.cut
    others = (plan.ranks - 1) / plan.ranks
    if plan.shards == 1:
        return 2 * others * gradients
    adapters = gradients if plan.lora else 0
    gathered = (2 * model.total - model.head) * plan.weight / plan.cut + 2 * adapters
    return others * (gathered + gradients)


def cut_traffic(model: Model, work: Work, plan: Plan) -> float:
    """Eq. (4): bytes that a device sends in a step to the others that share its products."""
    around = 2 * (plan.cut - 1) / plan.cut
    return around * (6 * model.layers * work.tokens * model.hidden * BF16 + work.scored * (model.hidden + 3) * FP32)


def seconds(model: Model, work: Work, plan: Plan, device: Device) -> tuple[float, bool]:
    """Eq. (5): a step, and whether communication sets its pace."""
    compute = products(model, work, plan) / (device.flops * device.efficiency)
    compute += cut_traffic(model, work, plan) / device.fast
    traffic = gradient_traffic(model, plan) / device.bandwidth(plan.devices)
    return max(compute, traffic), traffic > compute


def hiding_tokens(model: Model, lora: bool, device: Device) -> float:
    """Tokens of a device's step whose products take as long as FSDP2's communication between very many nodes."""
    work, plan = Work(), Plan("FSDP2", lora, 1 << 20)
    compute = products(model, work, plan) / (device.flops * device.efficiency)
    return work.tokens * gradient_traffic(model, plan) / device.slow / compute


def optimizer(model: Model, lora: bool) -> int:
    """Of ``configs/phi_1b_*.yaml``: Adam in fp32 for adapters, in 8 bits for bf16 weights."""
    with torch.device("meta"):
        number = torch.empty(trained(model, lora), 1, dtype=torch.float32 if lora else torch.bfloat16)
    return optimizer_bytes("adamw_torch" if lora else "adamw_torch_8bit", [number])


def memory(model: Model, work: Work, plan: Plan) -> float:
    """Eq. (6): bytes on a device."""
    gradients = trained(model, plan.lora) * plan.number
    weights = model.total * BF16 + gradients * plan.lora
    kept = (weights + gradients + optimizer(model, plan.lora)) / plan.shards
    block = model.block * BF16 + model.adapters * FP32 * plan.lora
    held = 0.0
    if plan.engine == "DDP" and plan.devices > 1:
        held = gradients  # in the buckets that are reduced
    elif plan.ranks > 1:
        unsharded = model.adapters * FP32 if plan.lora else model.block * BF16
        held = (2 * block + 2 * unsharded + model.head * BF16) / plan.cut
    inputs = model.layers * work.tokens * model.hidden * BF16
    recomputed = work.tokens * model.kept
    rows = work.scored * model.hidden * (FP32 + BF16)
    of_head = 0 if plan.lora else model.head * (FP32 + BF16) / plan.cut
    weight = torch.empty(-(-model.vocabulary // plan.cut), model.hidden, dtype=torch.bfloat16, device="meta")
    return kept + held + inputs + recomputed + rows + of_head + default_buffer_bytes(weight)


# ------------------------------------------------------------------------------------------------------------ measured

TINY = LlamaConfig(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=8192,
)
# SmolLM2-135M's.
SMALL = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
MEASURED = {"tiny": TINY, "135M": SMALL}
MEASURED_WORK = Work(prompts=2, prompt=64, responses=4, response=32)


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends in collectives, were they done in a ring: 2 (n - 1) / n of what is reduced and kept
    whole, (n - 1) / n of what is gathered or reduced and scattered, and the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            ranks = dist.get_world_size()
            share = (ranks - 1) / ranks
            name = function._opname
            if "allgather" in name:
                sent = share * tensor_bytes(_tensors(args[0]))
            elif "reduce_scatter" in name:
                sent = share * tensor_bytes(_tensors(args[1]))
            else:
                sent = 2 * share * tensor_bytes(_tensors(args[0]))
            self.bytes[name] = self.bytes.get(name, 0) + sent
        return result


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)


def make_trainer(config: PretrainedConfig, work: Work, folder: str, engine: str, lora: bool, steps: int) -> Any:
    """A run of the library's trainer on random tokens, in fp32."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mopo_kernels.data import PreferenceData, PreferenceExample, PreferencePair
    from mopo_kernels.trainer import MOPOConfig, MOPOTrainer

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 1000)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, 1000, (count,), generator=generator).tolist())

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    examples = [
        PreferenceExample(
            text(work.prompt),
            tuple(text(work.response - 1) for _ in range(work.responses)),
            tuple(PreferencePair(i, j, {"a": 1.0}) for i in range(work.responses) for j in range(i)),
        )
        for _ in range(work.prompts * ranks * steps)
    ]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    sharded = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}} if engine == "FSDP2" else {}
    arguments = MOPOConfig(
        output_dir=folder,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=work.prompts,
        optim="sgd",
        max_grad_norm=0.0,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        reference="precomputed",
        logging_steps=1000,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **sharded,  # type: ignore[arg-type]
    )
    data = PreferenceData.from_examples(examples, ["a"])
    # Numbers that the pass over the data would find are not needed for its time.
    data = data.with_ref_logprob([[-1.0] * work.responses for _ in examples])
    return MOPOTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)


@contextmanager
def stopwatch(seconds: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - started)


def watch(trainer: Any, steps: list[float], traffic: list[dict[str, float]]) -> None:
    """Time and collectives of each forward and backward; reductions of the multipliers are not among them."""
    inner = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        counter = Traffic()
        with counter, stopwatch(steps):
            result = inner(*args, **kwargs)
        traffic.append(counter.bytes)
        return result

    trainer.training_step = training_step


def bare_products(config: PretrainedConfig, work: Work, lora: bool) -> float:
    """Seconds for the step's products with weights alone, each timed here: one block's times L, and the head's."""
    model = on_meta(config)
    linear = [module for module in model.base_model.layers[0].modules() if isinstance(module, nn.Linear)]

    def product(rows: int, inner: int, columns: int) -> float:
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        taken: list[float] = []
        for _ in range(4):
            with stopwatch(taken):
                a @ b
        return statistics.median(taken[1:])

    total = 0.0
    for module in linear:
        forward = product(work.tokens, module.in_features, module.out_features)
        backward = product(work.tokens, module.out_features, module.in_features)
        own = 0.0 if lora else product(module.out_features, work.tokens, module.in_features)
        total += config.num_hidden_layers * (2 * forward + backward + own)
    head, hidden = config.vocab_size, config.hidden_size
    total += product(work.scored, hidden, head) + product(work.scored, head, hidden)
    return total + (0.0 if lora else product(head, work.scored, hidden))


def one_run(engine: str, lora: bool, shape: str, steps: int = 3) -> dict[str, Any]:
    taken: list[float] = []
    traffic: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(MEASURED[shape], MEASURED_WORK, folder, engine, lora, steps)
        watch(trainer, taken, traffic)
        trainer.train()
    return {
        "engine": engine,
        "lora": lora,
        "shape": shape,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "seconds": statistics.median(taken[1:]),
        "sent": traffic[-1],
    }


def child(jobs: list[dict[str, Any]], output: str) -> None:
    torch.set_num_threads(1)
    results = [one_run(**job) for job in jobs]
    if int(os.environ.get("RANK", "0")) == 0:
        Path(output).write_text(json.dumps(results), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)


def launch(ranks: int, jobs: list[dict[str, Any]], timeout: float = 900) -> list[dict[str, Any]]:
    """``one_run`` of each job, on so many gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"] if ranks > 1 else []
        command = [
            sys.executable,
            *start,
            "-m",
            "studies.cost_model",
            "--child",
            json.dumps(jobs),
            "--output",
            str(output),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=timeout)
        results: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
    return results


def expected_traffic(config: PretrainedConfig, engine: str, lora: bool, ranks: int) -> float:
    """Eq. (3) for a measured run, all of whose numbers are fp32."""
    return gradient_traffic(sizes_of(config, "measured"), Plan(engine, lora, ranks, weight=FP32))


def measure() -> dict[str, Any]:
    """Steps and their communication on one and on two processes, beside the products alone and eq. (3)."""
    torch.set_num_threads(1)
    jobs = [{"engine": "DDP", "lora": lora, "shape": shape} for shape in MEASURED for lora in (False, True)]
    sharded = [{"engine": "FSDP2", "lora": lora, "shape": shape} for shape in MEASURED for lora in (False, True)]
    results = launch(1, jobs) + launch(2, jobs + sharded)
    for row in results:
        config = MEASURED[row["shape"]]
        row["products"] = bare_products(config, MEASURED_WORK, row["lora"])
        row["expected"] = expected_traffic(config, row["engine"], row["lora"], row["ranks"])
    return {
        **provenance("studies.cost_model", ["--measure"]),
        "cores": len(os.sched_getaffinity(0)),
        "results": results,
    }


# -------------------------------------------------------------------------------------------------------------- tables


def models_table() -> str:
    lines = [
        "| | layers | H | V | numbers | in a block | adapters, r 16 | N that hides FSDP2 between nodes, LoRA | full |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    ]
    for name in CONFIGS:
        m = sizes(name)
        lines.append(
            f"| {name} | {m.layers} | {m.hidden} | {m.vocabulary} | {m.total / 1e9:.3f}e9 | {m.block / 1e6:.1f}e6 "
            f"| {trained(m, True) / 1e6:.1f}e6 | {hiding_tokens(m, True, Device()):,.0f} "
            f"| {hiding_tokens(m, False, Device()):,.0f} |\n"
        )
    return "".join(lines)


def _grid(cell: Callable[[Model, Plan], str]) -> str:
    lines = [f"| | | {' | '.join(map(str, COUNTS))} |\n|---|---|{'---|' * len(COUNTS)}\n"]
    for name in CONFIGS:
        for lora in (True, False):
            for engine in ENGINES:
                cells = " | ".join(cell(sizes(name), Plan(engine, lora, count)) for count in COUNTS)
                lines.append(f"| {name}, {'LoRA' if lora else 'full'} | {engine} | {cells} |\n")
    return "".join(lines)


def memory_table() -> str:
    device, work = Device(), Work()

    def cell(model: Model, plan: Plan) -> str:
        size = memory(model, work, plan)
        return f"{size / 1e9:.1f}" if size <= device.memory else f"({size / 1e9:.0f})"

    return _grid(cell)


def time_table() -> str:
    device, work = Device(), Work()

    def cell(model: Model, plan: Plan) -> str:
        if memory(model, work, plan) > device.memory:
            return ""
        taken, communicating = seconds(model, work, plan, device)
        rate = work.tokens / taken / plan.cut
        return f"{rate:,.0f}{' c' if communicating else ''}"

    return _grid(cell)


def measured_table() -> str:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = [
        f"{MEASURED_WORK.tokens} tokens a rank, {MEASURED_WORK.scored} of them scored, fp32, one thread a rank, "
        f"{record['cores']} core(s) for all ranks, {record['cpu_capability']}, torch {record['torch']}, commit "
        f"{record['commit']}; `{record['command']}`.\n\n"
        "| | engine | ranks | step | bare products | step / products on these cores "
        "| sent, counted | sent, eq. (3) |\n|---|---|---|---|---|---|---|---|\n"
    ]
    for row in record["results"]:
        sent = sum(row["sent"].values())
        ratio = row["seconds"] / (row["products"] * max(1.0, row["ranks"] / record["cores"]))
        lines.append(
            f"| {row['shape']}, {'LoRA' if row['lora'] else 'full'} | {'none' if row['ranks'] == 1 else row['engine']} "
            f"| {row['ranks']} | {row['seconds']:.2f} s | {row['products']:.2f} s | {ratio:.2f} "
            f"| {sent / 1e6:.2f} MB | {row['expected'] / 1e6:.2f} MB |\n"
        )
    return "".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "models": models_table,
    "memory": memory_table,
    "time": time_table,
    "measured": measured_table,
}


def replaced(document: str) -> str:
    """docs/scaling.md with its tables made anew."""
    return fill_marks(document, SECTIONS, "studies.cost_model", "docs/scaling.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure here before the tables are made")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child, arguments.output)
        return
    if arguments.measure:
        RECORD.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    for name, make in SECTIONS.items():
        print(f"{name}\n\n{make()}")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
