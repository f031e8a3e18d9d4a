"""Many trade-offs in one run: a LoRA adapter for each of several threshold vectors, on one frozen backbone.

The points are trained one after another. Side by side they would have nothing to share beyond the data and the
reference's log-probabilities: an adapter sits in every layer, so each policy needs a pass of its own through the whole
backbone, and activations, unlike weights, would have to be held once a point. What the points do share is made once:
the model in memory, the loaded and tokenised data, the reference's log-probabilities, and the adapter's first weights.

Every point ends, bit for bit, where a ``MOPOTrainer`` alone ends under its thresholds.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from transformers.trainer_utils import TrainOutput

from mopo_kernels.dual import ThresholdError
from mopo_kernels.evaluation import SWEEP_FILE, read_sweep
from mopo_kernels.mappings import parse_mapping
from mopo_kernels.tabular import nondominated
from mopo_kernels.trainer.checkpoint import last_complete_checkpoint, sole_run, write_atomically
from mopo_kernels.trainer.config import MOPOConfig
from mopo_kernels.trainer.lm_head import is_peft
from mopo_kernels.trainer.reference_model import copy_parameters, fingerprint, trained_parameters
from mopo_kernels.trainer.setup import as_preference_data
from mopo_kernels.trainer.trainer import MOPOTrainer, peak_memory_mib

UNCONSTRAINED = "no_thresholds"
# What file systems allow.
_LONGEST_NAME = 255

# What a point's numbers do not depend on: it may change before a sweep goes on.
_FREE = (
    "dataloader_",
    "disable_tqdm",
    "hub_",
    "log",
    "output_dir",
    "project",
    "push_to_hub",
    "reference_path",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_",
    "thresholds",
    "trackio_",
)


@dataclass(frozen=True)
class SweepPoint:
    """One threshold vector.

    Attributes:
        name: of the point and of its folder.
        thresholds: objective -> lower bound, on the scale of the run's estimator.
    """

    name: str
    thresholds: dict[str, float]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses what YAML's own loader passes over: of two equal keys it keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_sweep(path: str | Path, thresholds: Mapping[str, float] | None = None) -> list[SweepPoint]:
    """The points that a YAML or JSON file lists, in one of three forms.

    * a list of mappings, objective -> threshold: the points;
    * a mapping of names to such mappings: the points and their names;
    * a mapping, objective -> list of thresholds: every combination, the last objective's changing first.

    A threshold of null is none. An objective that a point says nothing about has the one in ``thresholds``, if any.
    A point without a name is called by its thresholds, as in ``brief=0.45,kind=0.5``.

    Raises:
        ValueError: a file that cannot be read or has another form, no point, a name that is no folder's, a threshold
            that is no number, or two points with one name or the same thresholds.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise ValueError(f"sweep: cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"sweep: {path} is neither YAML nor JSON: {error}") from error
    parts = list(content.values()) if isinstance(content, dict) else content
    named: list[tuple[str | None, dict[str, Any]]]
    if isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts):
        names = [str(name) for name in content] if isinstance(content, dict) else [None] * len(parts)
        named = list(zip(names, parts, strict=True))
    elif isinstance(content, dict) and parts and all(isinstance(part, list) and part for part in parts):
        named = [(None, dict(zip(content, values, strict=True))) for values in itertools.product(*parts)]
    else:
        raise ValueError(
            f"sweep: expected a list of mappings of objective to threshold, a mapping of names to such mappings, or a "
            f"mapping of objective to list of thresholds, in {path}; got {content!r}"
        )
    points = []
    for index, (name, own) in enumerate(named):
        argument = f"sweep[{index if name is None else name!r}]"
        lifted = {str(key) for key, value in own.items() if value is None}
        bounds = parse_mapping(argument, {key: value for key, value in own.items() if value is not None})
        merged = {key: value for key, value in (thresholds or {}).items() if key not in lifted} | bounds
        points.append(SweepPoint(_folder_name(argument, name, merged), merged))
    seen: dict[str, SweepPoint] = {}
    for point in points:
        for other in seen.values():
            if point.name.casefold() == other.name.casefold() or point.thresholds == other.thresholds:
                raise ValueError(
                    f"sweep: expected points that differ in name and thresholds; got {other.name} {other.thresholds} "
                    f"and {point.name} {point.thresholds}"
                )
        seen[point.name] = point
    return points


def _folder_name(argument: str, name: str | None, thresholds: Mapping[str, float]) -> str:
    if name is None:
        text = ",".join(f"{key}={value!r}" for key, value in thresholds.items())
        name = re.sub(r"[^\w.,=+-]", "_", text) or UNCONSTRAINED
    elif not re.fullmatch(r"[\w,=+-][\w.,=+ -]*", name):
        raise ValueError(f"{argument}: expected a name that can be a folder's; got {name!r}")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"{argument}: expected a name of at most {_LONGEST_NAME} bytes, as a folder's; got {name!r}")
    return name


class Sweep:
    """Trains one adapter after another, and keeps what they came to in ``sweep.json``.

    A sweep goes on where it ended: points that are finished are skipped, the one that was under way is resumed from its
    newest complete checkpoint, if it has one. A point whose thresholds cannot be met, on the labels or in training, and
    one that diverges, is recorded with its message; the others go on.

    ``reference="auto"`` means ``"precomputed"`` here: what one point would compute on the way, all of them share.

    Args:
        points: the threshold vectors.
        model: a ``PeftModel`` whose adapter has its first weights.
        args: the configuration of every point; in ``output_dir`` each has a folder of its name.
        train_dataset, eval_dataset, processing_class: as for ``MOPOTrainer``.
        save: called with a point's trainer and its ``TrainOutput``: evaluates, saves into ``trainer.args.output_dir``,
            and returns a summary with ``steps``, ``multiplier``, ``threshold``, ``in_sample`` and ``eval``.
        settings: what else the points' numbers depend on: a sweep goes on under the same only.
        afresh: train every point anew, whatever ``sweep.json`` has.
        loading_seconds: what making the model and the data took, for the report.

    Attributes:
        report: what ``sweep.json`` holds.

    Raises:
        ValueError: an argument that cannot work, or a ``sweep.json`` of another sweep, named.
        ModuleNotFoundError: moocore, which marks the non-dominated points, is not installed.
    """

    def __init__(
        self,
        points: Sequence[SweepPoint],
        model: nn.Module,
        args: MOPOConfig,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        save: Callable[[MOPOTrainer, TrainOutput], Mapping[str, Any]],
        *,
        settings: Mapping[str, Any] | None = None,
        afresh: bool = False,
        loading_seconds: float = 0.0,
    ) -> None:
        if not is_peft(model):
            raise ValueError(
                f"model: expected a PeftModel, as every point is an adapter on one frozen model; got "
                f"{type(model).__name__}"
            )
        data = as_preference_data(train_dataset, "train_dataset")
        objectives = data.objectives if args.objectives is None else tuple(args.objectives)
        self.primary = objectives[0] if args.primary is None else args.primary
        for point in points:
            if unknown := [name for name in point.thresholds if name not in objectives or name == self.primary]:
                raise ValueError(
                    f"sweep: expected thresholds for objectives among "
                    f"{', '.join(name for name in objectives if name != self.primary)}; got one for "
                    f"{', '.join(unknown)} in point {point.name}"
                )
        if args.fixed_multipliers:
            raise ValueError(f"fixed_multipliers: expected none in a sweep of thresholds; got {args.fixed_multipliers}")
        nondominated(np.empty((0, 1)))  # a missing package shows before the work, not after it
        self.points = list(points)
        self.model = model
        self.args = replace(args, reference="precomputed") if args.reference == "auto" else args
        self.processing_class = processing_class
        self.save = save
        self._data: tuple[Any, Any] = (data, eval_dataset)
        self._collator: Any = None
        self._attributes: dict[str, Any] | None = None
        self._initial = copy_parameters(model)
        self._folder = Path(str(args.output_dir))
        trained = sum(value.numel() * value.element_size() for value in self._initial.values())
        everything = sum(value.numel() * value.element_size() for value in model.parameters())
        self.report: dict[str, Any] = {
            "objectives": list(objectives),
            "primary": self.primary,
            "estimator": args.estimator,
            "compared": [name for name in objectives if name == self.primary or self._is_held(name)],
            "shared": {
                "backbone_bytes": everything - trained,
                "adapter_bytes": trained,
                "loading_seconds": loading_seconds,
                "reference_seconds": 0.0,
                "peak_memory_mib": peak_memory_mib(args.device),
            },
            "settings": self._settings(settings or {}),
            "points": [
                {"name": point.name, "thresholds": point.thresholds, "status": "pending"} for point in self.points
            ],
        }
        if not afresh:
            self._take_up()

    def _is_held(self, objective: str) -> bool:
        return any(objective in point.thresholds for point in self.points)

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the points' numbers depend on, as JSON gives it back."""
        digest = hashlib.sha256()
        for part in self._data:
            for row in () if part is None else part.dataset:
                digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
        training = {name: value for name, value in self.args.to_dict().items() if not name.startswith(_FREE)}
        given = {**training, **settings, "model": fingerprint(self.model), "data": digest.hexdigest()}
        found: dict[str, Any] = json.loads(json.dumps(given, default=str))
        return found

    def _take_up(self) -> None:
        """The records of an earlier call for the points that are still wanted.

        Raises:
            ValueError: it was under other settings, or a point of that name had other thresholds.
        """
        path = self._folder / SWEEP_FILE
        if not path.is_file():
            return
        before = read_sweep(self._folder)
        afresh = "another output_dir, or resume_from_checkpoint=false, begins afresh"
        for name, value in self.report["settings"].items():
            if (old := before["settings"].get(name)) != value:
                raise ValueError(f"{name}: expected {old!r}, with which {path} was begun; got {value!r} ({afresh})")
        self.report["shared"]["reference_seconds"] = before["shared"]["reference_seconds"]
        records = {record["name"]: record for record in before["points"]}
        for index, point in enumerate(self.points):
            record = records.get(point.name)
            if record is None:
                continue
            if record["thresholds"] != point.thresholds:
                raise ValueError(
                    f"sweep: expected thresholds {record['thresholds']} for point {point.name}, as {path} has them; "
                    f"got {point.thresholds} ({afresh})"
                )
            if record["status"] != "trained" or (self._folder / point.name / "adapter_config.json").is_file():
                self.report["points"][index] = record

    def run(self, progress: Callable[[int, Mapping[str, Any]], object] = lambda index, record: None) -> dict[str, Any]:
        """Train what is left to train and return the report.

        Args:
            progress: called with the index and the record of every point, once it is finished.

        Raises:
            TrainingInterrupted: after Ctrl-C; the same call goes on.
            ValueError: another sweep is under way in the folder.
        """
        with sole_run(self._folder) if self.args.process_index == 0 else nullcontext():
            for index, point in enumerate(self.points):
                record = self.report["points"][index]
                if record["status"] in ("pending", "running"):
                    resume = record["status"] == "running"
                    self._record(index, {"status": "running"})
                    self._record(index, self._train(point, resume))
                progress(index, self.report["points"][index])
        # Where nothing was left to train no record was made.
        self._mark_front()
        return self.report

    def _record(self, index: int, values: Mapping[str, Any]) -> None:
        point = self.points[index]
        self.report["points"][index] = {"name": point.name, "thresholds": point.thresholds, **values}
        self._mark_front()
        if self.args.process_index == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / SWEEP_FILE, json.dumps(self.report, indent=2) + "\n")

    def _mark_front(self) -> None:
        """``nondominated`` of every trained point: no other has as much of each compared objective and more of one.

        Compared is satisfaction on the held-out data where there is any, else its running mean on the training pairs.
        """
        trained = [record for record in self.report["points"] if record["status"] == "trained"]
        part = self.report["front"] = "eval" if trained and all(r["satisfaction"]["eval"] for r in trained) else "train"
        names = [name for name in self.report["compared"] if all(name in r["satisfaction"][part] for r in trained)]
        if not trained or not names:
            return
        marks = nondominated([[record["satisfaction"][part][name] for name in names] for record in trained])
        for record, mark in zip(trained, marks, strict=True):
            record["nondominated"] = bool(mark)

    def _train(self, point: SweepPoint, resume: bool) -> dict[str, Any]:
        """One point from the first weights, or from its last checkpoint, to its record."""
        started = time.perf_counter()
        folder = self._folder / point.name
        name = self.args.run_name
        config = replace(
            self.args,
            output_dir=str(folder),
            thresholds=dict(point.thresholds),
            run_name=None if name is None else f"{name}/{point.name}",
            resume_from_checkpoint=None,
        )
        checkpoint = last_complete_checkpoint(folder) if resume else None
        self._reset()
        trainer = None
        try:
            trainer = MOPOTrainer(
                self.model,
                config,
                data_collator=self._collator,
                train_dataset=self._data[0],
                eval_dataset=self._data[1],
                processing_class=self.processing_class,
            )
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise ValueError(
                    "sweep: expected one process or DDP, as shards are not given back; got FSDP or DeepSpeed"
                )
            self._share(trainer)
            output = trainer.train(resume_from_checkpoint=checkpoint)
            record = {**self._measured(trainer, self.save(trainer, output)), "resumed_from": checkpoint}
        except (ThresholdError, FloatingPointError) as error:
            status = "infeasible" if isinstance(error, ThresholdError) else "diverged"
            record = {"status": status, "message": str(error)}
        finally:
            if trainer is not None:
                trainer.accelerator.free_memory()
            del trainer
            self._reset()
        record["seconds"] = time.perf_counter() - started
        record["peak_memory_mib"] = peak_memory_mib(self.args.device)
        return record

    def _share(self, trainer: MOPOTrainer) -> None:
        """Before the first point: the reference's log-probabilities, for it and the points to come."""
        if self._collator is None:
            self._collator = trainer.data_collator
            started = time.perf_counter()
            # As in MOPOTrainer.train: the random state that training starts from is the same in every point.
            with torch.random.fork_rng(devices=[]):
                trainer._prepare_references()
            self.report["shared"]["reference_seconds"] += time.perf_counter() - started
            self.report["shared"]["peak_memory_mib"] = peak_memory_mib(self.args.device)
            # All of it: a point with thresholds holds its dual data out by itself, one without trains on everything.
            self._data = trainer.given_dataset, None if self._data[1] is None else trainer.eval_dataset
            self._attributes = dict(self.model.__dict__)

    @torch.no_grad()
    def _reset(self) -> None:
        """The model as the first point found it, and nothing kept of the point before."""
        for name, parameter in trained_parameters(self.model).items():
            parameter.copy_(self._initial[name])
            parameter.grad = None
        if self._attributes is not None:
            # accelerate hangs its forward, and that it has been there, on the model, and then passes over it.
            self.model.__dict__.clear()
            self.model.__dict__.update(self._attributes)
        wandb = sys.modules.get("wandb")
        if getattr(wandb, "run", None) is not None:
            # transformers would log the next point into the run that it finds open.
            wandb.finish()  # type: ignore[union-attr]
        gc.collect()

    def _measured(self, trainer: MOPOTrainer, summary: Mapping[str, Any]) -> dict[str, Any]:
        """What a point came to: in-sample as running means, and on held-out data where there is any."""
        held_out = {name: summary["eval"].get(f"eval_satisfaction/{name}") for name in trainer.objectives}
        satisfaction = {
            "train": dict(summary["in_sample"]),
            "eval": {name: value for name, value in held_out.items() if value is not None},
        }
        logged = [line["kl_first"] for line in trainer.state.log_history if "kl_first" in line]
        return {
            "status": "trained",
            "steps": summary["steps"],
            "multiplier": summary["multiplier"],
            "threshold": summary["threshold"],
            "satisfaction": satisfaction,
            "standard_error": {
                name: error
                for name in trainer.objectives
                if (error := summary["eval"].get(f"eval_standard_error/{name}")) is not None
            },
            "slack": {
                part: {name: values[name] - bound for name, bound in summary["threshold"].items() if name in values}
                for part, values in satisfaction.items()
            },
            "primary": {part: values.get(self.primary) for part, values in satisfaction.items()},
            "kl": {"train": logged[-1] if logged else None, "eval": summary["eval"].get("eval_kl_first")},
        }
