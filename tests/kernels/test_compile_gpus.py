"""Every kernel compiles for the GPUs that people have, also where there is none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
# Shared memory that one program may use, in KiB, by compute capability.
MAX_SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
# The registers of these three are capped (`ObserveConfig`, `DecodeConfig`) so that a
# third program fits, so they may spill. The cap was chosen on an H200: there scoring
# gains more than it loses; that of log-sum-exps, whose spills come before its loop, was
# not timed. On others the bytes are what the compilers make of it.
CAPPED_REGISTERS = {"score_kernel": 168, "decode_tiles_kernel": 168, "lse_kernel": 80}
MAX_SPILL = {
    "score_kernel": {80: 192, 89: 208, 90: 128, 100: 352},
    "lse_kernel": {80: 0, 89: 0, 90: 16, 100: 16},
    "decode_tiles_kernel": {80: 0, 89: 16, 90: 32, 100: 32},
}
# Shapes beside those of most models, where no register is left: the most that Triton
# 3.6 (SGLang 0.5.17) and 3.8 make of them.
MAX_SPILL_WIDE = {
    "score_kernel": {80: 8, 89: 16, 90: 16, 100: 144},
    "decode_tiles_kernel": {80: 48, 89: 16, 90: 32, 100: 32},
    "lse_kernel": {80: 24, 89: 24, 90: 0, 100: 0},
}

# An e4m3 cache, as Triton 3.8 makes it; sm80 converts with integers. Not tuned yet.
MAX_SPILL_E4M3 = {"score_kernel": {80: 128, 89: 128, 90: 160}}


# With an older Triton only what most GPUs run that it is used on: enough to see that it
# compiles what is written for the newest one.
NEWEST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
COMPILED = tuple(MAX_SHARED) if NEWEST else (90,)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """A process for each GPU, all at once; this one may interpret Triton."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_gpus"]
    started = {
        capability: subprocess.Popen(
            [*command, str(capability), *([] if NEWEST else ["usual"])],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in COMPILED
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("capability", COMPILED)
def test_kernels_compile_and_spill_nothing_unawares(
    runs: dict[int, subprocess.Popen[str]], capability: int
) -> None:
    out, err = runs[capability].communicate()
    assert runs[capability].returncode == 0, err[-3000:]
    kernels = [json.loads(line) for line in out.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    # append 1, decode 2, observe 3, pool 1, novelty 2, select 3, pack 3, head table 1,
    # key diff 2, positional 2, held 1.
    assert len(names) == 21, names
    for kernel in kernels:
        capped = kernel["registers"] == CAPPED_REGISTERS.get(kernel["kernel"])
        usual = {} if kernel["usual"] and not capped else MAX_SPILL
        allowed = [usual] if kernel["usual"] else [MAX_SPILL_WIDE, usual]
        if kernel["e4m3"]:
            allowed.append(MAX_SPILL_E4M3)
        spills = [some.get(kernel["kernel"], {}).get(capability, 0) for some in allowed]
        assert kernel["spilled"] <= max(spills), kernel
        assert kernel["shared"] <= MAX_SHARED[capability] * 1024, kernel
        if kernel["kernel"] == "decode_tiles_kernel":
            # Pages, K and V: without the pipeliner it would wait for every tile.
            assert kernel["async_copies"] >= 3, kernel
