"""Everything that needs a GPU, in one run: kernels, memcheck, serving against stock.

    python -m bench.gpu_check --model PATH_OF_AN_8B_SHAPE [--out DIR]
    python -m bench.gpu_check --steps memcheck --files test_pool test_select

1. kernels: every one against its reference (``pytest tests/kernels``);
2. memcheck: the small cases again under ``compute-sanitizer --tool memcheck``, a
   process for each file, `workers` at a time;
3. serving: `bench.serving`, 256 requests of 100 to 8,000 tokens at rate 8, dummy
   weights, CUDA graphs, overlap, the same pool for stock SGLang and for --kv-compress.

Appends to ``gpu_check.jsonl`` and ``serve.jsonl`` in ``--out``. Stops at the first red
step: no figure is printed for a build whose kernels are wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.common.record import environment, write_record

PYTEST = ["-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
SMALL = (
    "groups or padding_rows or test_equals_reference or only_new or more_than_one "
    "or pooling or launches_are or kv_dtype or keep_apart or come_back"
)
PASSED = re.compile(r"(\d+) passed")
STEPS = ("kernels", "memcheck", "serving")
NOTHING_SELECTED = 5
"""What pytest returns then."""
MEMCHECK = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]


def run(name: str, command: list[str], out: Path, **environ: str) -> None:
    """Run one step, print its last lines and record what passed."""
    started = time.perf_counter()
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environ},
        check=False,
    )
    seconds = time.perf_counter() - started
    passed = PASSED.search(done.stdout)
    record = {
        "step": name,
        "returncode": done.returncode,
        "passed": int(passed[1]) if passed else 0,
        "seconds": round(seconds, 1),
    }
    write_record(out / "gpu_check.jsonl", {**environment(), **record})
    tail = "\n".join(done.stdout.strip().splitlines()[-3:])
    print(f"== {name}: rc {done.returncode}, {seconds:.0f} s\n{tail}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:])
        raise SystemExit(f"{name} failed; nothing further is run")


def memcheck(out: Path, test: Path) -> None:
    """The small cases of one file, if it has any, under memcheck."""
    chosen = [sys.executable, *PYTEST, str(test), "-k", SMALL]
    listed = subprocess.run(
        [*chosen, "--collect-only"], capture_output=True, check=False
    )
    if listed.returncode != NOTHING_SELECTED:
        # Every tensor in an allocation of its own: an overrun leaves it.
        own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run(f"memcheck, {test.stem}", [*MEMCHECK, *chosen], out, **own)


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with an 8B config.json")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--pool", type=int, default=131072)
    parser.add_argument("--workers", type=int, default=6, help="at a time")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--files", nargs="*", help="of memcheck; default: all")
    args = parser.parse_args()
    if "serving" in args.steps and not args.model:
        parser.error("serving needs --model; or leave it out of --steps")
    tests = sorted(Path("tests/kernels").glob("test_*.py"))
    if args.files:
        if unknown := set(args.files) - {test.stem for test in tests}:
            parser.error(f"--files: no {', '.join(sorted(unknown))} in tests/kernels")
        tests = [test for test in tests if test.stem in args.files]
    python = sys.executable
    try:
        import xdist  # noqa: F401

        parallel = ["-n", str(args.workers)]
    except ImportError:
        parallel = []
    if "kernels" in args.steps:
        run("kernels", [python, *PYTEST, *parallel, "tests/kernels"], args.out)
    if "memcheck" in args.steps:
        with ThreadPoolExecutor(args.workers) as pool:
            # Read, so that what was raised there is raised here.
            list(pool.map(partial(memcheck, args.out), tests))
    if "serving" not in args.steps:
        return
    serve = [python, "-m", "bench.serving", "--model", args.model]
    serve += ["--load-format", "dummy", "--pool", str(args.pool)]
    serve += ["--out", str(args.out / "serve.jsonl")]
    subprocess.run(serve, check=True)


if __name__ == "__main__":
    main()
