"""Engines that serve loads, each run checked and recorded as it ends."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.common.gpu_memory import GpuMemory
from bench.common.ports import free_ports
from bench.common.record import ROOT, commit, write_record
from bench.serving import log, report
from bench.serving.child import Child, ChildError, start_engine
from bench.serving.loads import OURS, STOCK
from bench.serving.plan import Clock, Run, Spec, check, engine_arguments

IDLE_SECONDS = 3.0
START_SECONDS = 60.0
START_LIMIT = 400.0
WARM_LEN, WARM_OUTPUT = 1500, 80
TOO_LONG = "maximum allowed length"
ENVIRONMENT = (
    "import json, sys; from bench.common.record import environment; "
    "sys.argv = sys.argv[1:]; print(json.dumps(environment()))"
)


class Session:
    """Engines, runs and records of one call."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.clock = Clock(args.deadline)
        self.memory = GpuMemory()
        self.children: dict[Spec, Child] = {}
        self.facts: dict[Spec, dict[str, Any]] = {}
        self.red = False
        self._environment: dict[str, Any] = {}
        self._stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        # In a process of its own, while engines load: asking CUDA for the name of the
        # device may make a context, which would show up as used memory.
        self._asked = subprocess.Popen(
            [sys.executable, "-c", ENVIRONMENT, *sys.argv],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._done: dict[tuple[str, str, float], int] = {}
        if args.skip_done:
            for one in report.select(report.read_records(args.out)):
                if one["commit"] == commit() and report.ok(one):
                    key = (one["load"], one["system"], one["rate"])
                    self._done[key] = self._done.get(key, 0) + 1

    def say(self, text: str) -> None:
        """One progress line."""
        print(f"[{self.clock.elapsed():6.1f} s] {text}", flush=True)

    def record(self, values: dict[str, Any]) -> None:
        """Append a record with all that is needed to repeat it."""
        self.red |= "error" in values or values.get("ok") is False
        if not self._environment:
            text = self._asked.communicate()[0].strip().splitlines()
            self._environment = json.loads(text[-1])
        now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        write_record(self.args.out, {**self._environment, "time": now, **values})

    def engine_id(self, spec: Spec) -> str:
        """Name of an engine, unique over calls."""
        return f"{spec.name}#{self._stamp}"

    def batch(self, runs: list[Run]) -> None:
        """Start the engines of these runs, serve them, check and stop the engines."""
        runs = [run for run in runs if self._done.get(run.key, 0) <= run.repeat]
        room = self.clock.left() - START_SECONDS
        if not any(self.clock.expected(run) <= room for run in runs):
            self.say(f"{len(runs)} runs left out")
            return
        specs = list(dict.fromkeys(run.spec for run in runs))
        try:
            self.start(specs)
            for spec in specs:
                first = next(run for run in runs if run.spec == spec)
                if spec in self.children and first.load.mode != "first":
                    self.warm(first)
            for run in runs:
                if run.spec not in self.children:
                    self.record({**self.describe(run), "error": "its engine failed"})
                elif self.clock.fits(run):
                    self.serve(run, alone=len(specs) == 1)
                else:
                    self.say(f"left out, no time: {run.spec.name} {run.key}")
            if self.children:
                time.sleep(IDLE_SECONDS)
            for spec in list(self.children):
                self.check_alive(spec)
        finally:
            for child in self.children.values():
                if child.process.stdin:
                    child.process.stdin.close()
            for child in self.children.values():
                child.close()
            self.children.clear()

    def start(self, specs: list[Spec]) -> None:
        """Start all engines and wait for them; the ones that fail are left out."""
        self.say(f"starting {', '.join(spec.name for spec in specs)}")
        before = self.memory.now
        for spec, port in zip(specs, free_ports(len(specs)), strict=True):
            keywords = engine_arguments(self.args, spec)
            path = self.folder / f"{spec.name}.log"
            stock = spec.system == STOCK
            self.children[spec] = start_engine(keywords, path, port=port, stock=stock)
        for spec in specs:
            try:
                ready = self.children[spec].wait(START_LIMIT)
            except ChildError as problem:
                self.fail(spec, f"start: {problem}")
                continue
            self.facts[spec] = {
                **ready,
                **log.parse_start(self.children[spec].read_log()),
            }
            self.say(f"{spec.name} ready in {ready['ready_s']:.0f} s")
        if len(specs) > 1:
            self.say("engines take turns; an idle one uses no GPU time")
            return
        time.sleep(0.7)  # two samples
        for facts in self.facts.values():
            facts["memory_before_mib"] = before
            facts["memory_idle_mib"] = self.memory.now

    def warm(self, run: Run) -> None:
        """Send two short requests: kernels are loaded before anything is timed."""
        command = run.load.command(run.spec.system, run.rate)
        command |= {"op": "run", "prompts": 2, "seed": 1, "min_input_len": 0}
        command["input_len"] = min(run.load.input_len, WARM_LEN)
        command["output_len"] = min(run.load.output_len, WARM_OUTPUT)
        child = self.children[run.spec]
        try:
            child.ask(command, self.args.limit)
            child.ask({"op": "flush"}, 60)
        except ChildError as problem:
            self.fail(run.spec, f"warm-up: {problem}")

    def describe(self, run: Run) -> dict[str, Any]:
        """The part of a run's record that is known before it starts."""
        command = run.load.command(run.spec.system, run.rate)
        pool, min_budget = run.load.pool, run.spec.min_budget
        return {
            "engine": self.engine_id(run.spec),
            "load": run.load.id,
            "system": run.spec.system,
            "rate": run.rate,
            "repeat": run.repeat,
            "prompts": command["prompts"],
            "settings": {**command, "pool": pool, "min_budget": min_budget},
            "extra": {**dict(run.spec.extra), **json.loads(self.args.extra_args)},
            "model": Path(self.args.model).name,
            "load_format": self.args.load_format,
        }

    def serve(self, run: Run, alone: bool) -> None:
        """Serve one run and record it."""
        load, spec = run.load, run.spec
        child, facts = self.children[spec], self.facts[spec]
        command = load.command(spec.system, run.rate)
        limit = self.args.limit
        if load.seconds:
            limit = min(max(60.0, 4 * self.clock.expected(run)), limit)
        values = self.describe(run)
        self.memory.restart()
        position, began = child.position(), time.monotonic()
        try:
            answer = child.ask(command, limit)
            values |= log.parse_log(child.read_log(position))
            flushed = child.ask({"op": "flush"}, 60)
            if "failed" in flushed:
                raise ChildError(flushed["failed"])
        except ChildError as problem:
            self.record({**values, "error": str(problem)})
            self.fail(spec, f"{load.id}: {problem}")
            return
        self.clock.learn(run, time.monotonic() - began)
        values |= {key: value for key, value in answer.items() if key != "lengths"}
        values |= {**facts, "memory_peak_mib": self.memory.peak if alone else None}
        wrong = check(run, answer, facts["plugin_loaded"])
        if wrong and spec.system != OURS and TOO_LONG in wrong:
            values["refused"] = wrong
        elif wrong:
            values["error"] = wrong
        else:
            tokens = answer["input_tokens"] + sum(answer["lengths"])
            values["requests_per_s"] = command["prompts"] / answer["seconds"]
            values["tokens_per_s"] = tokens / answer["seconds"]
        self.record(values)
        said = wrong[:200] or (
            f"{answer['seconds']:.1f} s, {values['tokens_per_s']:.0f} tok/s, batch "
            f"{values['largest_batch']}, step {values['decode_step_ms']} ms"
        )
        self.say(f"{load.id} {spec.name} rate {run.rate:g} #{run.repeat}: {said}")

    def check_alive(self, spec: Spec) -> None:
        """Check that an idle engine lives: SGLang looks for leaks and dies of one."""
        try:
            answer = self.children[spec].ask({"op": "alive"}, 60)
        except ChildError as problem:
            self.fail(spec, f"idle check: {problem}")
            return
        good = answer.get("tokens") == 8
        self.record({"engine": self.engine_id(spec), "ok": good, "answer": answer})
        self.say(f"{spec.name}: idle check {'passed' if good else 'FAILED'}")

    def fail(self, spec: Spec, problem: str) -> None:
        """Give an engine up: nothing it has measured counts."""
        self.say(f"{spec.name} FAILED: {problem}")
        self.record({"engine": self.engine_id(spec), "ok": False, "problem": problem})
        self.children.pop(spec).close(timeout=5)
