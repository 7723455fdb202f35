"""Several ranks of one server, each a real scheduler in a process of its own.

``python -m tests.engine.ranks JOBS.pkl RESULTS.pkl`` starts them. Every rank is fed the
same load poll by poll, as by SGLang's broadcast. They meet in the forward passes, and
`SGLANG_KVC_CHECK_RANKS` compares what they are about to do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_kvc.upstream.ranks import CHECK
from tests.engine import warm
from tests.engine.inprocess import (
    InProcessScheduler,
    Output,
    Request,
    make_server_args,
)

CORES = 2
TIMEOUT_S = 900


@dataclass
class Load:
    """Requests that are served to the end, and the switches under which they are.

    Attributes
    ----------
    retract_every : polls between forced retractions, 0 for none.
    trace : keep what every head of the rank keeps.
    """

    requests: list[Request]
    overlap: bool = True
    radix: bool = True
    retract_every: int = 0
    trace: bool = False


@dataclass
class Served:
    """What one rank says of one load.

    Attributes
    ----------
    outputs : by request.
    kept : as `PassTracer.kept`, with `trace`.
    lengths : as `PassTracer.lengths`.
    checked : steps that were compared with the other ranks.
    whole : every page is free again after a flush.
    brought_back : snapshots that came from host memory.
    """

    outputs: dict[str, Output] = field(default_factory=dict)
    kept: dict[int, Any] = field(default_factory=dict)
    lengths: dict[int, list[int]] = field(default_factory=dict)
    checked: int = 0
    whole: bool = False
    brought_back: int = 0


@dataclass
class Job:
    """What the ranks of one server do.

    Attributes
    ----------
    server_args : for `make_server_args`, among them ``model`` and ``tp_size``.
    mutant : name of a fault that the last rank has, see `_plant`.
    """

    server_args: dict[str, Any]
    loads: list[Load]
    compress: bool = True
    mutant: str = ""

    @property
    def ranks(self) -> int:
        """How many there are."""
        return int(self.server_args["tp_size"])


@dataclass
class Result:
    """What came of a job: by rank and load, or the ends of the logs of its ranks."""

    served: list[list[Served]] = field(default_factory=list)
    error: str = ""

    def by_rank(self) -> list[list[Served]]:
        """By rank and load; fails with the logs of the ranks."""
        assert not self.error, self.error
        return self.served


def serve_jobs(folder: Path, jobs: list[Job]) -> list[Result]:
    """Run jobs one after another, in processes of their own."""
    source, target = folder / "jobs.pkl", folder / "results.pkl"
    source.write_bytes(pickle.dumps(jobs))
    words, environ = (source, target), {CHECK: "1"}
    log = folder / "ranks.log"
    said = warm.run("tests.engine.ranks", *words, log=log, environ=environ)
    assert target.exists(), said
    results: list[Result] = pickle.loads(target.read_bytes())
    return results


def main(source: str, target: str) -> None:
    """Fork the ranks of every job: SGLang is imported once for all of them."""
    importlib.import_module("tests.engine.preloaded")
    jobs: list[Job] = pickle.loads(Path(source).read_bytes())
    folder = Path(target).parent
    results = [_run(job, folder / f"job{i}") for i, job in enumerate(jobs)]
    Path(target).write_bytes(pickle.dumps(results))


def _run(job: Job, folder: Path) -> Result:
    from sglang.srt.server_args import PortArgs

    folder.mkdir()
    # As many entries as ranks.
    cores = [str(rank % CORES) for rank in range(job.ranks)]
    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    # The ranks find each other by them.
    ports = PortArgs.init_new(
        make_server_args(compress=job.compress, **job.server_args)
    )
    context = multiprocessing.get_context("fork")
    running = [
        context.Process(target=_rank, args=(job, rank, ports, folder))
        for rank in range(job.ranks)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(TIMEOUT_S)
        process.kill()
    logs = [folder / f"rank{rank}.log" for rank in range(job.ranks)]
    answers = [log.with_suffix(".pkl") for log in logs]
    if not all(answer.exists() for answer in answers):
        return Result(error="\n\n".join(log.read_text()[-3000:] for log in logs))
    return Result([pickle.loads(answer.read_bytes()) for answer in answers])


def _rank(job: Job, rank: int, ports: Any, folder: Path) -> None:
    """Serve the loads of a job as one of its ranks."""
    from sglang.srt.model_executor import model_runner

    log = folder / f"rank{rank}.log"
    with log.open("w") as opened:
        os.dup2(opened.fileno(), 1)
        os.dup2(opened.fileno(), 2)
    # On GPUs several ranks have copies of a KV head; on CPUs SGLang makes up new ones.
    model_runner.adjust_config_with_unaligned_cpu_tp = lambda config, *_: config
    nodes = job.server_args.get("nnodes", 1)
    own = {**job.server_args, "node_rank": rank * nodes // job.ranks}
    args = make_server_args(compress=job.compress, **own)
    scheduler = InProcessScheduler(args, rank, ports)
    if job.mutant and rank == job.ranks - 1:
        _plant(job.mutant)
    served = [_serve(scheduler, load, job.compress) for load in job.loads]
    log.with_suffix(".pkl").write_bytes(pickle.dumps(served))
    # The groups of the ranks would wait for each other.
    os._exit(0)


def _serve(scheduler: InProcessScheduler, load: Load, compress: bool) -> Served:
    from sglang.srt.managers import scheduler as stock

    scheduler.set_radix(load.radix)
    scheduler.set_overlap(load.overlap)
    stock.TEST_RETRACT = load.retract_every > 0
    stock.TEST_RETRACT_INTERVAL = max(load.retract_every, 1)
    served = Served()
    if not compress:
        served.outputs = scheduler.serve(load.requests)
        return served
    from sglang_kvc.attention import rank_check
    from tests.engine.tracer import PassTracer

    compare = rank_check.ranks.extremes

    def counted(values: Any) -> Any:
        served.checked += 1
        return compare(values)

    rank_check.ranks.extremes = counted
    runtime = scheduler.allocator.get_kvcache().runtime
    try:
        if load.trace:
            with PassTracer(runtime) as tracer:
                served.outputs = scheduler.serve(load.requests)
            served.kept, served.lengths = tracer.kept, tracer.lengths
        else:
            served.outputs = scheduler.serve(load.requests)
    finally:
        rank_check.ranks.extremes = compare
    store = scheduler.sch.tree_cache.sessions
    if store is not None and store.host is not None:
        served.brought_back = store.host.brought_back
    scheduler.flush()
    allocator = scheduler.allocator
    served.whole = allocator.available_size() == allocator.size
    return served


def _plant(mutant: str) -> None:
    """Let this rank decide otherwise."""
    from sglang_kvc.scheduling.passes import PassScheduler

    assert mutant == "late pass"
    take = PassScheduler._take_pages
    calls = 0

    def once_late(self: Any, batch: Any, tokens: int) -> Any:
        nonlocal calls
        calls += 1
        return None if calls == 2 else take(self, batch, tokens)

    PassScheduler._take_pages = once_late


if __name__ == "__main__":
    # What is pickled must not be of the module ``__main__``.
    from tests.engine import ranks

    ranks.main(*sys.argv[1:])
