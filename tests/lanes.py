"""Run the tests in two lanes, which is what `make test` does.

``python -m tests.lanes [PATH ...]``: without a path everything, with the kernels; else
those files. Most tests keep one core busy for minutes, so on two cores two lanes take
little more than half the time:

* all that needs neither Triton's interpreter nor SGLang in processes of its own;
* kernels, in a process of their own, because the interpreter must be chosen before
  Triton is imported, and SGLang's own kernels must not run in it; then servers.

The second lane is shown when the first one is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

NO_TESTS = 5
"""Exit code of pytest that has found none."""
KERNELS = "tests/kernels"
LOOK_S = 0.5


def lanes(paths: list[str]) -> tuple[list[str], list[list[str]]]:
    """Arguments of pytest for the first lane, and for each run in the second."""
    chosen = paths or [f"--ignore={KERNELS}"]
    kernels = [] if paths else [[KERNELS]]
    return ["-m", "not server", *chosen], [*kernels, ["-m", "server", *chosen]]


def run(arguments: list[str], out: IO[bytes] | None = None) -> int:
    """Run pytest once; its exit code."""
    env = dict(os.environ)
    # Some twenty processes import SGLang: 18 s of CPU, or 45 where no bytecode is kept.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    if arguments == [KERNELS]:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(
        command, stdout=out, stderr=out, env=env, check=False
    ).returncode


def main(paths: list[str]) -> int:
    """Run both lanes; 0 if all tests passed and there was one."""
    first, second = lanes(paths)
    codes: list[int] = []
    with tempfile.NamedTemporaryFile() as log, open(log.name, "rb") as shown:
        behind = threading.Thread(
            target=lambda: codes.extend(run(each, log) for each in second)
        )
        behind.start()
        codes.append(run(first))
        running = True
        while running:
            running = behind.is_alive()
            sys.stdout.buffer.write(shown.read())
            sys.stdout.flush()
            time.sleep(LOOK_S if running else 0)
    return max((code for code in codes if code != NO_TESTS), default=NO_TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
