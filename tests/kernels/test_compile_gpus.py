"""Every kernel compiles for the GPUs that people have, also where there is none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton

ROOT = Path(__file__).parents[2]
# Shared memory that one program may use, in KiB, by compute capability.
MAX_SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
# The registers of these three are capped (`ObserveConfig`, `DecodeConfig`) so that a
# third program fits, so they may spill. The cap was chosen on an H200: there scoring
# gains more than it loses; that of log-sum-exps, whose spills come before its loop, was
# not timed. On others the bytes are what the compilers make of it.
CAPPED_REGISTERS = {"score_kernel": 168, "decode_tiles_kernel": 168, "lse_kernel": 80}
MAX_SPILL = {
    "score_kernel": {80: 192, 86: 208, 89: 208, 90: 128, 100: 352},
    "lse_kernel": {80: 0, 86: 0, 89: 0, 90: 16, 100: 16},
    "decode_tiles_kernel": {80: 0, 86: 0, 89: 16, 90: 32, 100: 32},
}
# Shapes beside those of most models, where no register is left: the most that Triton
# 3.6 (SGLang 0.5.17) and 3.8 make of them.
MAX_SPILL_WIDE = {
    "score_kernel": {80: 8, 86: 24, 89: 24, 90: 16, 100: 144},
    "decode_tiles_kernel": {80: 48, 89: 16, 90: 32, 100: 32},
    "lse_kernel": {80: 24, 89: 24, 90: 0, 100: 0},
}

# An e4m3 cache, as Triton 3.8 makes it; sm80 converts with integers. Not tuned yet.
MAX_SPILL_E4M3 = {"score_kernel": {80: 128, 86: 136, 89: 136, 90: 160}}

# It takes all registers that there are, at heads of 256 everywhere; e4m3 on sm80.
MAX_SPILL_PREFILL = {
    "packed_prefill_kernel": {80: 216, 86: 64, 89: 64, 90: 56, 100: 104}
}

NEWEST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
WANTED = os.environ.get("KVC_TEST_COMPILE", "usual")
"""``usual``, in ``make test``; ``matrix``, in CI; ``all``: see `compile_gpus.build`."""
ALL = WANTED == "all"
# With an older Triton only what most GPUs run that it is used on: enough to see that it
# compiles what is written for the newest one. All of the matrix takes half an hour.
COMPILED = tuple(MAX_SHARED) if NEWEST and WANTED != "usual" else (90,)
EXTENT = [] if WANTED == "matrix" and NEWEST else ["all" if ALL else "usual"]

Kernel = dict[str, Any]


class Runs:
    """A process for each GPU, all at once; this one may interpret Triton."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "tests.kernels.compile_gpus"]
        self.processes = {
            capability: subprocess.Popen(
                [*command, str(capability), *EXTENT],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for capability in COMPILED
        }

    @cache  # noqa: B019 - as long as the module's one object.
    def kernels(self, capability: int) -> list[Kernel]:
        """What was compiled for this GPU."""
        out, err = self.processes[capability].communicate()
        assert self.processes[capability].returncode == 0, err[-3000:]
        return [json.loads(line) for line in out.splitlines()]

    def largest_decode(self, capability: int) -> Kernel:
        """The decode kernel with most shared memory: of head_dim 256."""
        kernels = self.kernels(capability)
        decode = [it for it in kernels if it["kernel"] == "decode_tiles_kernel"]
        return max(decode, key=lambda it: it["shared"])


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = Runs()
    yield started
    for process in started.processes.values():
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("capability", COMPILED)
def test_kernels_compile_and_spill_nothing_unawares(
    runs: Runs, capability: int
) -> None:
    kernels = runs.kernels(capability)
    names = {kernel["kernel"] for kernel in kernels}
    # append 1, decode 2, observe 3, pool 1, novelty 2, select 3, pack 3, head table 1,
    # key diff 2, positional 2, held 3, prefill 1; of sm86 decode, observe, prefill.
    assert len(names) == (6 if capability == 86 and not ALL else 24), names
    for kernel in kernels:
        capped = kernel["registers"] == CAPPED_REGISTERS.get(kernel["kernel"])
        usual = {} if kernel["usual"] and not capped else MAX_SPILL
        allowed = [usual] if kernel["usual"] else [MAX_SPILL_WIDE, usual]
        allowed.append(MAX_SPILL_PREFILL)
        if kernel["e4m3"]:
            allowed.append(MAX_SPILL_E4M3)
        spills = [some.get(kernel["kernel"], {}).get(capability, 0) for some in allowed]
        assert kernel["spilled"] <= max(spills) or not kernel["bounded"], kernel
        assert kernel["shared"] <= MAX_SHARED[capability] * 1024, kernel
        if kernel["kernel"] == "decode_tiles_kernel":
            # Pages, K and V: without the pipeliner it would wait for every tile.
            assert kernel["async_copies"] >= 3, kernel


@pytest.mark.slow
@pytest.mark.skipif(len(COMPILED) == 1, reason="compiled for one GPU, not the matrix")
@pytest.mark.parametrize("capability", [86, 89])
def test_a_small_gpu_gets_as_many_stages_as_fit(runs: Runs, capability: int) -> None:
    """Both figures are of compiled kernels; `default_config` asks for five stages."""
    here, large = runs.largest_decode(capability), runs.largest_decode(80)
    assert (here["stages"], large["stages"]) == (4, 5)
    assert here["shared"] <= MAX_SHARED[capability] * 1024 < large["shared"]
