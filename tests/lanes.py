"""Run the tests in two lanes, which is what `make test` does.

``python -m tests.lanes [PATH ...]``: without a path everything but the newcomer's path,
with the kernels; else those files. Most tests keep one core busy for minutes, so on two
cores two lanes take little more than half the time:

* all that does not need Triton's interpreter, servers last;
* kernels, in a process of their own, because the interpreter must be chosen before
  Triton is imported, and SGLang's own kernels must not run in it; then what the first
  lane has not begun, from its end: servers first.

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

from tests.claims import BACKWARDS, CLAIMS

NO_TESTS = 5
"""Exit code of pytest that has found none."""
KERNELS = "tests/kernels"
NEWCOMER = "tests/newcomer"
"""Minutes of one server and one model; CI runs it by itself."""
LOOK_S = 0.5


def run(
    arguments: list[str],
    claims: str = "",
    backwards: bool = False,
    out: IO[bytes] | None = None,
) -> int:
    """Run pytest once; its exit code.

    Parameters
    ----------
    claims : the folder of a selection that two runs share.
    backwards : whether this is the second of them.
    """
    env = dict(os.environ)
    # Some fifteen processes import SGLang, which takes thrice as long without bytecode.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    if arguments == [KERNELS]:
        env["TRITON_INTERPRET"] = "1"
    if claims:
        env |= {CLAIMS: claims, BACKWARDS: str(int(backwards))}
        arguments = ["-p", "tests.claims", *arguments]
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(
        command, stdout=out, stderr=out, env=env, check=False
    ).returncode


def main(paths: list[str]) -> int:
    """Run both lanes; 0 if all tests passed and there was one."""
    chosen = paths or [f"--ignore={KERNELS}", f"--ignore={NEWCOMER}"]
    codes: list[int] = []
    with (
        tempfile.TemporaryDirectory() as claims,
        tempfile.NamedTemporaryFile() as log,
        open(log.name, "rb") as shown,
    ):

        def second() -> None:
            if not paths:
                codes.append(run([KERNELS], out=log))
            codes.append(run(chosen, claims, True, log))

        behind = threading.Thread(target=second)
        behind.start()
        codes.append(run(chosen, claims))
        running = True
        while running:
            running = behind.is_alive()
            sys.stdout.buffer.write(shown.read())
            sys.stdout.flush()
            time.sleep(LOOK_S if running else 0)
    return max((code for code in codes if code != NO_TESTS), default=NO_TESTS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
