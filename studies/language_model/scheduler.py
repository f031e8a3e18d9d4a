"""Jobs with dependencies on several processes, each result in a file of its own: what is there is not done again."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import multiprocessing
import os
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

BUNDLE = "results.json.gz"
# Seconds that running jobs are given to end after the deadline.
_GRACE = 20.0
# Between two calls of what keeps the results: a machine may be taken away at any time.
_KEEP_SECONDS = 20.0
# How often a job is tried whose process died or ran out of memory, beside others that need it, too.
_TRIES = 2


@dataclass(frozen=True)
class Job:
    """Something to do once.

    Attributes:
        name: of its file; unique.
        kind: what to do, for ``perform``.
        spec: with what, fit for JSON; a result of another spec is not taken for this one's.
        needs: names of jobs that must be done before.
        cost: how long it takes, in any unit that all jobs with one share: none is begun that would outlast the
            deadline by what those before it took. 0 for what is short.
    """

    name: str
    kind: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    cost: float = 0.0


Perform = Callable[[Job], Mapping[str, Any]]
"""Does a job; made once in each process by a ``Setup``."""
Setup = Callable[[Any], Perform]
"""From settings that can be pickled; a function of a module."""


def result_file(out: Path, name: str) -> Path:
    return out / "jobs" / f"{name}.json"


def read_result(out: Path, name: str) -> dict[str, Any] | None:
    """The record of a job, or None where there is no whole one."""
    try:
        record: dict[str, Any] = json.loads(result_file(out, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def write_atomically(path: Path, content: bytes) -> None:
    """The file has its old content or all of the new, whatever happens on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def same_spec(record: Mapping[str, Any], job: Job) -> bool:
    return bool(record.get("kind") == job.kind and record.get("spec") == json.loads(json.dumps(job.spec)))


def is_done(out: Path, job: Job) -> bool:
    """Whether the result is there, of this very job and without an error."""
    record = read_result(out, job.name)
    return record is not None and "error" not in record and same_spec(record, job)


def _last_line(text: str) -> str:
    return text.strip().rsplit("\n", 1)[-1]


def _serve(connection: Connection, setup: Setup, settings: Any, out: Path) -> None:
    """A process: gets ready once, then does one job after another."""
    perform: Perform | None = None
    while (job := connection.recv()) is not None:
        begun = time.perf_counter()
        record: dict[str, Any] = asdict(job)
        broken = again = False
        try:
            if perform is None:
                perform = setup(settings)
                record["setup_seconds"] = round(time.perf_counter() - begun, 1)
                begun = time.perf_counter()
            record["result"] = perform(job)
        except Exception as error:  # a job's failure is a result: the others go on
            record["error"] = traceback.format_exc()
            broken = "CUDA error" in str(error)
            again = broken or "OutOfMemory" in type(error).__name__
        record["job_seconds"] = round(time.perf_counter() - begun, 2)
        write_atomically(result_file(out, job.name), json.dumps(record, separators=(",", ":")).encode())
        connection.send((_last_line(record.get("error", "")), again, record["job_seconds"]))
        if broken:
            return  # nothing works on the device any more in this process: another takes its place


class _Worker:
    def __init__(self, context: Any, setup: Setup, settings: Any, out: Path) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup, settings, out), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job, self.begun = job, time.monotonic()
        with contextlib.suppress(OSError):  # it has just ended, which is seen where its report is waited for
            self.connection.send(job)

    def dismiss(self) -> None:
        """Let it end after the job in hand."""
        with contextlib.suppress(OSError):  # it is gone already
            self.connection.send(None)

    def stop(self, patience: float) -> None:
        """Wait so long for its end, then make one."""
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5.0)


def log(line: str, since: float) -> None:
    print(f"[{time.monotonic() - since:7.1f} s] {line}", flush=True)


def run_jobs(
    jobs: Iterable[Job],
    out: Path,
    setup: Setup,
    settings: Any,
    *,
    workers: int,
    deadline: float | None = None,
    since: float | None = None,
    follow_up: Callable[[Mapping[str, dict[str, Any]]], Sequence[Job]] | None = None,
    follow_up_by: float | None = None,
    keep: Callable[[], object] | None = None,
    grace: float = _GRACE,
    first_pace: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Do the jobs that are not done yet, in their order as far as their needs allow.

    Args:
        jobs: the work; earlier ones first.
        out: folder of the results.
        setup, settings: see ``Setup``; called once in each process, with the first job.
        workers: processes.
        deadline: seconds after ``since`` at which no further job is begun; those under way get a little time to end.
        since: ``time.monotonic()`` that the deadline counts from; default now.
        follow_up: called when all is done, with the results so far; the jobs it gives are done next, until none come.
        follow_up_by: seconds after ``since`` at which it is called even if jobs are left: those are not begun.
        keep: called now and then while results come, at the deadline before anything is waited for, and at the end.
        grace: seconds that jobs under way are given at the deadline.
        first_pace: seconds a unit of cost, until some jobs have been timed.

    Returns:
        name -> record (``result``, or ``error``) of every job that was tried, in this call or before.
    """
    begun = time.monotonic() if since is None else since
    # Until when jobs may begin: before the follow-up, and after it.
    limit = deadline if follow_up_by is None else min(follow_up_by, math.inf if deadline is None else deadline)
    out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    pool: list[_Worker] = []
    known: dict[str, Job] = {}
    done: set[str] = set()
    failed: dict[str, str] = {}
    tries: dict[str, int] = {}
    kept = time.monotonic()
    waiting: list[Job] = []
    # Seconds a unit of cost, of the newest jobs.
    pace: list[float] = [] if first_pace is None else [first_pace]

    def add(more: Iterable[Job]) -> bool:
        fresh = []
        for job in more:
            if job.name in known:
                if known[job.name] != job:
                    raise ValueError(f"jobs: expected names of their own; got two of {job.name}")
                continue
            known[job.name] = job
            fresh.append(job)
        for job in fresh:
            if unknown := [name for name in job.needs if name not in known]:
                raise ValueError(f"job {job.name} needs {', '.join(unknown)}, which is no job")
            if is_done(out, job):
                done.add(job.name)
            else:
                waiting.append(job)
        # A policy that was not brought along with the results is trained again where something still needs it.
        lacking = {""}
        while lacking:
            needed = {name for job in waiting for name in job.needs if name in done and known[name].kind == "train"}
            lacking = {name for name in needed if not (out / "adapters" / name).is_dir()}
            done.difference_update(lacking)
            waiting[:0] = [known[name] for name in sorted(lacking)]
        return bool(fresh)

    def ready() -> Job | None:
        for job in waiting:
            if broken := [name for name in job.needs if name in failed]:
                waiting.remove(job)
                failed[job.name] = f"needs {broken[0]}, which failed"
                log(f"skipped {job.name}: {failed[job.name]}", begun)
                return ready()
            if all(name in done for name in job.needs) and fits(job):
                waiting.remove(job)
                return job
        return None

    def fits(job: Job) -> bool:
        if limit is None or not pace:
            return True
        # As all but the slowest of late: what it takes where many processes share a device varies.
        usual = sorted(pace)[math.ceil(0.75 * (len(pace) - 1))]
        return time.monotonic() - begun + job.cost * usual < limit + grace

    def late() -> bool:
        return deadline is not None and time.monotonic() - begun > deadline

    def cut() -> None:
        """Give up what is left of the jobs before the follow-up."""
        nonlocal limit
        log(f"going on with the next jobs: {len(waiting)} of these not begun", begun)
        for job in waiting:
            del known[job.name]
        waiting.clear()
        limit = deadline

    def finish(worker: _Worker, error: str, again: bool, seconds: float) -> None:
        job = worker.job
        assert job is not None
        worker.job = None
        if again and tries.get(job.name, 0) + 1 < _TRIES:
            tries[job.name] = tries.get(job.name, 0) + 1
            waiting.append(job)
            log(f"again later: {job.name} ({error})", begun)
            return
        if error:
            failed[job.name] = error
        else:
            done.add(job.name)
            if job.cost:
                pace[:] = [*pace, seconds / job.cost][-2 * workers :]
        count = f"{len(done) + len(failed)}/{len(known)}"
        log(f"{count} {'FAILED ' if error else ''}{job.name} {seconds:.1f} s{': ' + error if error else ''}", begun)

    add(jobs)
    log(f"{len(known)} jobs, {len(done)} of them done; {workers} processes", begun)
    try:
        while True:
            if follow_up_by is not None and limit == follow_up_by and time.monotonic() - begun > follow_up_by:
                cut()
            pool[:] = [worker for worker in pool if worker.job is not None or worker.process.is_alive()]
            if not late():
                while len(pool) < workers and len(pool) < len(waiting):
                    pool.append(_Worker(context, setup, settings, out))
                for worker in pool:
                    if worker.job is None and (job := ready()) is not None:
                        worker.give(job)
            busy = [worker for worker in pool if worker.job is not None]
            if late():
                break
            if not busy:
                if waiting:  # nothing of it can begin in time
                    if limit == deadline:
                        break
                    cut()
                if follow_up is not None and add(follow_up(records(out, done))):
                    continue
                break
            if keep is not None and time.monotonic() > kept + _KEEP_SECONDS:
                keep()
                kept = time.monotonic()
            patience = 1.0 if deadline is None else max(0.0, min(1.0, deadline - (time.monotonic() - begun)))
            _collect(busy, patience, finish, pool)
        if late():
            left = [job.name for job in waiting]
            log(f"deadline: {len(left)} jobs not begun, {sum(w.job is not None for w in pool)} under way", begun)
            if keep is not None:
                keep()
            end = time.monotonic() + grace
            while (busy := [w for w in pool if w.job is not None]) and time.monotonic() < end:
                _collect(busy, 1.0, finish, pool)
    finally:
        if keep is not None:
            keep()
        for worker in pool:
            if worker.job is None:
                worker.dismiss()
            else:
                worker.process.kill()
        for worker in pool:
            worker.stop(5.0)
    log(f"{len(done)} done, {len(failed)} failed, {len(known) - len(done) - len(failed)} left", begun)
    return records(out, known)


def _collect(
    busy: Sequence[_Worker], patience: float, finish: Callable[[_Worker, str, bool, float], None], pool: list[_Worker]
) -> None:
    """Wait for reports; a process that died takes its job with it, not the others."""
    by_end: dict[Any, _Worker] = {}
    for worker in busy:
        by_end[worker.connection] = by_end[worker.process.sentinel] = worker
    for end in wait(list(by_end), patience):
        worker = by_end[end]
        if worker.job is None:
            continue
        try:
            if worker.connection.poll():
                finish(worker, *worker.connection.recv())
                continue
        except (EOFError, OSError):
            pass
        worker.process.join()
        finish(worker, f"its process ended with code {worker.process.exitcode}", True, time.monotonic() - worker.begun)
        pool.remove(worker)


def records(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records there are of these jobs."""
    return {name: record for name in names if (record := read_result(out, name)) is not None}


def bundle(out: Path, about: Mapping[str, Any], adapters: Sequence[str] = (), place: Path | None = None) -> list[Path]:
    """All results of ``out`` in one file, and each of the named adapters in a tar, its numbers in bf16.

    Args:
        out: the folder of the results.
        place: the folder of these files; default ``out``.
        about: what else to keep: commit, device, versions.
        adapters: names of runs; one that is not there is passed over.

    Returns:
        the files written.
    """
    place = place or out
    names = sorted(path.name.removesuffix(".json") for path in (out / "jobs").glob("[!.]*.json"))
    content = {**about, "jobs": records(out, names)}
    write_atomically(place / BUNDLE, pack(content))
    written = [place / BUNDLE]
    for name in adapters:
        folder = out / "adapters" / name
        if not (folder / "adapter_model.safetensors").is_file():
            logging.getLogger(__name__).warning("no adapter %s to bundle", name)
            continue
        path = place / f"adapter_{name.replace('/', '_')}.tar"
        _pack(folder, name, path)
        written.append(path)
    return written


def _pack(folder: Path, name: str, path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save

    half = {key: value.to(torch.bfloat16) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file, content in (
            ("adapter_model.safetensors", save(half)),
            ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        ):
            entry = tarfile.TarInfo(f"{name}/{file}")
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    write_atomically(path, buffer.getvalue())


def without_traces(content: Mapping[str, Any]) -> dict[str, Any]:
    """A bundle's content with what failed in a line: traces name places on the machine."""
    jobs = {
        name: {**record, "error": _last_line(record["error"])} if "error" in record else record
        for name, record in content["jobs"].items()
    }
    return {**content, "jobs": jobs}


def pack(content: Mapping[str, Any]) -> bytes:
    """The bytes of a bundle: the same for the same content."""
    return gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)


def read_bundle(path: Path) -> dict[str, Any]:
    """What ``bundle`` wrote."""
    content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return content
