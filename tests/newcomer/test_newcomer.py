"""A newcomer's path: every command of the guide, in its order, from a wheel.

The environment is empty, but reads that of the tests as a second folder of packages;
the wheel is installed in front of it. With `KVC_TEST_FULL_INSTALL=1` the wheel brings
everything from the index instead, in minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_kvc.tools import serve
from tests.engine.server import START_S, free_port, tail
from tests.engine.texts import corpus
from tests.unit.guide_commands import GUIDE, commands
from tests.unit.packed_tree import copy_packed

pytestmark = pytest.mark.server

FULL = os.environ.get("KVC_TEST_FULL_INSTALL") == "1"
LAUNCH, SERVE = "python -m sglang.launch_server", "python -m sglang_kvc.tools.serve"
DOCTOR = "python -m sglang_kvc.tools.doctor"
ADVISE, VIEW = "python -m sglang_kvc.tools.advise", "python -m sglang_kvc.tools.view"
ON_A_CPU = "--device cpu --dtype float32"
FEW = "--rates 1,4 --max-new-tokens 4"
SMALL = "--max-total-tokens 8192 --max-running-requests 8 --sleep-on-idle"
NOT_RUN = {
    LAUNCH: "doctor is asked about its flags",
    "pip install -e .": "it makes the environment of a clone; this one is a wheel's",
    "python -m bench.": "of a clone; no wheel has it",
    "chromium ": "tests/unit/test_view_browser.py draws the page",
    "python -m sglang_router.": "two machines; tests/engine/test_gateway.py",
}
"""Beginnings of commands, and why not."""
ADDED = {
    "pip wheel": "" if FULL else "--no-build-isolation",
    "pip install": "" if FULL else "--no-deps",
    DOCTOR: ON_A_CPU,
    ADVISE: f"{FEW} --no-speed",
    f"{VIEW} --url": "--rates 4 --max-new-tokens 4",
    f"{VIEW} --prompt": "--url http://127.0.0.1:30000",
}
"""What the test adds to them: a machine without a GPU, and without minutes."""


class Newcomer:
    """Somebody at a shell.

    Parameters
    ----------
    clone : where what is packed was copied.
    home : an empty folder, in which the rest is typed.
    """

    def __init__(self, clone: Path, home: Path, model: str) -> None:
        self.clone, self.home, self.model = clone, home, model
        self.port = free_port()
        self.log = home / "serve.log"
        self.server: subprocess.Popen[bytes] | None = None
        path = f"{home / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        gone = ("PYTHONPATH", "TRITON_INTERPRET", "VIRTUAL_ENV")
        self.environ = {k: v for k, v in os.environ.items() if k not in gone}
        self.environ |= {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "*"}

    def type(self, command: str, folder: Path | None = None) -> str:
        """Run a command; it must succeed. What it printed."""
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=folder or self.home,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=None if FULL else START_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{self.tail()}"
        return done.stdout

    def follow(self, command: str, flags: dict[str, str]) -> str:
        """Do as the guide says; what was printed.

        Parameters
        ----------
        flags : by how commands begin, of all that begin so. Each start of a server
            takes a minute, so there is one; of the others doctor says, once, whether
            they would start.
        """
        command = command.replace("[THE FLAGS OF YOUR SERVER]", flags[LAUNCH])
        command = command.replace("MODEL", self.model)
        added = [more for start, more in ADDED.items() if command.startswith(start)]
        command = " ".join([command, *added[:1]])
        command = command.replace(":30000", f":{self.port}")
        if command.startswith(SERVE):
            self.start(f"{SERVE} {flags[SERVE]}")
            return ""
        if str(self.port) in command:
            self.wait()
        return self.type(
            command, self.clone if command.startswith("pip wheel") else None
        )

    def start(self, command: str) -> None:
        """Start the server, once."""
        if self.server is None:
            command += f" --model {self.model} --port {self.port} {SMALL}"
            with self.log.open("wb") as out:
                self.server = subprocess.Popen(
                    ["bash", "-c", f"exec {command}"],
                    cwd=self.home,
                    env=self.environ,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )

    def wait(self) -> None:
        """Until the server answers."""
        assert self.server is not None, "the guide asks a server before it starts one"
        url = f"http://127.0.0.1:{self.port}"
        assert serve.wait_until_ready(self.server, url), self.tail()

    def tail(self) -> str:
        """End of the server's log."""
        return tail(self.log) if self.log.exists() else ""


@pytest.fixture
def newcomer(model_path: str, tmp_path: Path) -> Iterator[Newcomer]:
    """With an empty environment, and with files to ask about."""
    (tmp_path / "clone").mkdir()
    (tmp_path / "home").mkdir()
    clone = copy_packed(tmp_path / "clone")
    made = Newcomer(clone, tmp_path / "home", model_path)
    shutil.copytree(clone / "docs", made.home / "docs")
    (made.home / "FILE").write_text(corpus()[:1500])
    lines = [{"prompt": corpus()[at : at + 1500]} for at in (2000, 4000)]
    (made.home / "FILE.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made.type(f"{sys.executable} -m venv venv")
    if not FULL:
        # Behind its own packages; an editable install there comes after these.
        packages = next((made.home / "venv").glob("lib/python3*/site-packages"))
        others = sysconfig.get_path("purelib")
        # Python 3.11 gives an old one.
        made.type("pip uninstall -qy setuptools")
        (packages / "others.pth").write_text(
            f"import site; site.addsitedir({others!r})\n"
        )
    yield made
    if made.server is not None:
        # As by Ctrl-C: it stops what it has started.
        made.server.terminate()
        assert made.server.wait(60) == 0, made.tail()


def test_every_command_of_the_guide_works_in_order(newcomer: Newcomer) -> None:
    typed = commands(GUIDE.read_text())
    left_out = {it for it in typed if it.startswith(tuple(NOT_RUN))}
    flags = {
        start: " ".join(it.removeprefix(start) for it in typed if it.startswith(start))
        for start in (LAUNCH, SERVE)
    }
    assert "--kv-compress-sessions" in flags[LAUNCH]
    said: dict[str, str] = {}
    for command in typed:
        if command.startswith("pip install sglang_kvc"):
            for wheel in newcomer.clone.glob("*.whl"):
                shutil.copy(wheel, newcomer.home)
        if command not in left_out:
            said[command] = newcomer.follow(command, flags)
        if command.startswith("pip install sglang_kvc"):
            found = newcomer.type(
                "python -c 'import sglang_kvc as s; print(s.__file__)'"
            )
            assert Path(found.splitlines()[-1]).is_relative_to(newcomer.home / "venv")
            assert "No broken requirements" in newcomer.type("pip check")
    for start in NOT_RUN:
        assert any(it.startswith(start) for it in left_out), f"no command {start}"

    def told(start: str) -> str:
        return next(text for command, text in said.items() if command.startswith(start))

    assert "supported" in told(DOCTOR)
    assert "Cannot tell" in told(ADVISE)
    assert '"resident_tokens"' in told("curl http")
    assert "'min_budget': 64" in told("curl -s")
    assert "<html" in (newcomer.home / "view.html").read_text()
