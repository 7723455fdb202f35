"""Every kernel compiles for an H100 or H200, also where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Shared memory that one program may use on sm_90, bytes.
MAX_SHARED = 227 * 1024
# Where the scoring kernel's registers are capped (`ObserveConfig`), so that a third
# program fits, it may spill as many bytes a thread: on an H200 the program gains more.
CAPPED_REGISTERS, CAPPED_SPILL = 168, 128


def test_kernels_compile_and_spill_nothing_unawares() -> None:
    # A process of its own: this one may interpret Triton.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_sm90"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    # append 1, decode 2, observe 3, pool 1, distinct 2, select 3, pack 3, head table 1,
    # key similarity 2, positional 2.
    assert len(names) == 20, names
    for kernel in kernels:
        capped = kernel["kernel"] == "score_kernel"
        capped = capped and kernel["registers"] == CAPPED_REGISTERS
        assert kernel["spilled"] <= (CAPPED_SPILL if capped else 0), kernel
        assert kernel["shared"] <= MAX_SHARED, kernel
        if kernel["kernel"] == "decode_tiles_kernel":
            # Pages, K and V: without the pipeliner it would wait for every tile.
            assert kernel["async_copies"] >= 3, kernel
