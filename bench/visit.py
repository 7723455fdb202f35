"""Run the commands of a visit to a GPU side by side; what is timed runs alone.

    python -m bench.visit plan.json --logs FOLDER --seconds 1500

A rented GPU costs by the minute, and a server takes one to start. So everything is
started as soon as it may, and while a command is timed the others are stopped
(SIGSTOP) and go on afterwards. ``plan.json`` is a list of objects:

=========== ===========================================================================
``name``    of the command and of its log, ``FOLDER/NAME.log``
``command`` for bash
``after``   names that must have ended, however they did
``needs``   files that must be there
``alone``   true: nothing else runs from its start; a pattern: from the line of its
            log that matches, as ``ready in`` of a bench whose engine is up
``limit``   seconds that it may run; time in which it is stopped does not count
``until``   second of the visit after which it is not started any more, and ended
``env``     more variables
``cwd``     folder; default: this one
=========== ===========================================================================

Only name and command are needed. What is in the way of a command that wants to be alone
is not ended: it waits for a pattern, and holds back those with ``alone`` true until the
ones that run have ended. ``FOLDER/visit.log`` says what happened when.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from bench.common.processes import family

POLL_SECONDS = 0.5
LEAST_SECONDS = 5.0
"""Nothing is started that has less left."""


@dataclass
class Command:
    """One object of the plan; see the module docstring."""

    name: str
    command: str
    after: Sequence[str] = ()
    needs: Sequence[str] = ()
    alone: bool | str = False
    limit: float = 600.0
    until: float = float("inf")
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "."


class Running:
    """A command that was started.

    Parameters
    ----------
    plan : Command
    logs : Path
        Folder of its log.
    """

    def __init__(self, plan: Command, logs: Path) -> None:
        self.plan, self.log = plan, logs / f"{plan.name}.log"
        self.used, self.stopped, self._seen = 0.0, False, time.monotonic()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", plan.command],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=plan.cwd,
                env={**os.environ, **plan.env},
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether it has; adds up the time in which it was not stopped."""
        now = time.monotonic()
        if not self.stopped:
            self.used += now - self._seen
        self._seen = now
        return self.process.poll() is not None

    def alone(self) -> bool:
        """Whether it wants to be alone from now on."""
        wish = self.plan.alone
        if isinstance(wish, bool):
            return wish
        return bool(re.search(wish, self.log.read_text(errors="replace")))

    def send(self, number: signal.Signals) -> None:
        """Signal it and all that it has started, in whatever session they are."""
        for process in family(self.process.pid):
            try:
                process.send_signal(number)
            except psutil.Error:
                continue

    def stop(self) -> None:
        """Stop it, and what it has started since."""
        self.stopped = True
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self.stopped = False
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """End it with all that it has started."""
        self.send(signal.SIGKILL)
        self.process.wait()


class Visit:
    """The commands of one visit.

    Parameters
    ----------
    plan : sequence of Command
    logs : Path
        An existing folder.
    seconds : float
        When everything is ended.
    """

    def __init__(self, plan: Sequence[Command], logs: Path, seconds: float) -> None:
        self.waiting, self.logs, self.seconds = list(plan), logs, seconds
        self.running: list[Running] = []
        self.pending = {one.name for one in plan}
        self._start = time.monotonic()
        self._log: IO[str] = (logs / "visit.log").open("w", buffering=1)

    def now(self) -> float:
        """Seconds of the visit."""
        return time.monotonic() - self._start

    def run(self) -> None:
        """Run everything that finds its time."""
        while self.waiting or self.running:
            self._end()
            timed = next((one for one in self.running if one.alone()), None)
            self._hold(timed)
            if timed is None:
                self._start_more()
            time.sleep(POLL_SECONDS)
        self._say("done")
        self._log.close()

    def _say(self, text: str) -> None:
        self._log.write(f"[{self.now():7.1f}] {text}\n")

    def _end(self) -> None:
        """Forget what has ended, and end what has no time left."""
        for one in list(self.running):
            over = self.now() > min(self.seconds, one.plan.until)
            if not one.ended():
                if not over and one.used <= one.plan.limit:
                    continue
                one.kill()
                self._say(f"{one.plan.name}: out of time")
            status = one.process.returncode
            self._say(f"{one.plan.name}: ended with {status} after {one.used:.0f} s")
            self.running.remove(one)
            self.pending.discard(one.plan.name)

    def _hold(self, timed: Running | None) -> None:
        """Stop all but `timed`; without it let all go on."""
        for one in self.running:
            if timed is not None and one is not timed:
                if not one.stopped:
                    self._say(f"{one.plan.name}: stopped for {timed.plan.name}")
                one.stop()
            elif one.stopped:
                one.go_on()
                self._say(f"{one.plan.name}: goes on")

    def _start_more(self) -> None:
        """Start what may start now."""
        for plan in list(self.waiting):
            if self.now() > min(self.seconds, plan.until) - LEAST_SECONDS:
                self._say(f"{plan.name}: not started, no time left")
                self.pending.discard(plan.name)
            elif not self._may_start(plan):
                continue
            else:
                self._say(f"{plan.name}: started")
                self.running.append(Running(plan, self.logs))
            self.waiting.remove(plan)
            if self.running and self.running[-1].plan.alone is True:
                return

    def _may_start(self, plan: Command) -> bool:
        """Whether what it waits for is there, and nothing that keeps it from timing."""
        if plan.alone is True and self.running:
            return False
        there = (Path(plan.cwd, need).exists() for need in plan.needs)
        return not self.pending & set(plan.after) and all(there)


def read_plan(path: Path) -> list[Command]:
    """Commands of a file.

    Raises
    ------
    ValueError
        For an unknown key, a name that is there twice, or one in ``after`` that is not.
    """
    try:
        plan = [Command(**one) for one in json.loads(path.read_text())]
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    names = [one.name for one in plan]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: these names are there twice: {', '.join(twice)}")
    if unknown := sorted({name for one in plan for name in one.after} - set(names)):
        raise ValueError(f"{path}: nothing is called {', '.join(unknown)}")
    return plan


def main(words: Sequence[str] | None = None) -> None:
    """Parse arguments and run the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args(words)
    try:
        plan = read_plan(args.plan)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    args.logs.mkdir(parents=True, exist_ok=True)
    Visit(plan, args.logs, args.seconds).run()


if __name__ == "__main__":
    main()
