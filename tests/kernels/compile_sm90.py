"""Compile every kernel for sm_90, without a GPU.

``python -m tests.kernels.compile_sm90``

The wrappers run on CPU tensors under a driver that only names the target, and each
launch stops after compilation. Prints one JSON object a kernel: registers, spilled
bytes and shared memory as ptxas reports them, and the asynchronous copies that the
pipeliner made. Must not run under TRITON_INTERPRET=1.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sglang_kvc.kernels.append import append_kv_triton
from sglang_kvc.kernels.decode_attention import NewTokens, decode_attention_triton
from sglang_kvc.kernels.decode_schedule import default_config
from sglang_kvc.kernels.distinct import add_distinct_triton
from sglang_kvc.kernels.head_tables import head_tables_triton
from sglang_kvc.kernels.key_similarity import key_similarity_scores_triton
from sglang_kvc.kernels.observe import observe_scores_triton
from sglang_kvc.kernels.pack import commit_tables_triton, pack_entries_triton
from sglang_kvc.kernels.pool import Pooling, pool_scores_triton
from sglang_kvc.kernels.positional import random_scores_triton, recency_scores_triton
from sglang_kvc.kernels.select import select_entries_triton
from sglang_kvc.kernels.testing import make_case, make_plan

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
compiled: dict[str, Any] = {}


class Target:
    """A driver for compilation only."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(
    self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
) -> Any:
    """Stand-in for `JITFunction.run`."""
    kernel = original_run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled[kernel.hash] = kernel
    return kernel


def launch_decode(heads: int, group: int, dim: int) -> None:
    """Call the decode wrappers, which plan too, once."""
    lengths = [5000, 333]
    case = make_case(2, 2, heads, group, dim, lengths, [256, 128], dtype=torch.bfloat16)
    q = torch.randn(2, heads * group, dim, dtype=torch.bfloat16)
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(lengths)
    decode_attention_triton(q, case.arena, 1, case.tables, slots, seq_lens, 0.1)


def launch_step(heads: int, group: int, dim: int, **switches: Any) -> None:
    """Call the decode wrappers as servers do: new tokens, rings, maybe switches."""
    lengths = [5000, 333]
    case = make_case(2, 2, heads, group, dim, lengths, [256, 128], dtype=torch.bfloat16)
    q = torch.randn(2, heads * group, dim, dtype=torch.bfloat16)
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(lengths)
    decode_attention_triton(
        q,
        case.arena,
        1,
        case.tables,
        slots,
        seq_lens,
        0.1,
        query_lse=case.query_lse,
        new_tokens=NewTokens(q[:, :heads], q[:, :heads], slots, case.query_ring),
        config=default_config(dim)._replace(**switches),
    )


def launch_all(layers: int, heads: int, group: int, dim: int, window: int) -> None:
    """Call every wrapper once."""
    case = make_case(
        2,
        layers,
        heads,
        group,
        dim,
        [5000, 333],
        [256, 128],
        dtype=torch.bfloat16,
        window=window,
    )
    arena, tables = case.arena, case.tables
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(case.seq_lens)
    q = torch.randn(2, heads * group, dim, dtype=torch.bfloat16)
    k = q[:, :heads]
    decode_attention_triton(q, arena, 1, tables, slots, seq_lens, 0.1)
    append_kv_triton(k, k, q, arena, 1, slots, case.query_ring, slots)
    plan = make_plan(case)
    rings = case.query_ring, case.query_lse
    scores = observe_scores_triton(*rings, arena, tables, plan, 0.1, 2, window)
    key_similarity_scores_triton(arena, tables, plan)
    observe_scores_triton(*rings, arena, tables, plan, 0.1, 2, window, True)
    recency_scores_triton(arena, tables, plan)
    random_scores_triton(arena, tables, plan, 0)
    pool = Pooling(64, 3, 0.95, 0.03)
    scores = pool_scores_triton(scores, plan, tables, pool, arena.heads_per_page)
    count = arena.heads_per_page
    units = torch.zeros(9)
    add_distinct_triton(scores, scores, units, plan, tables, 0.5, count)
    select_entries_triton(scores, count, tables, plan, 4, bound_groups=layers)
    selected = select_entries_triton(scores, count, tables, plan, 4)
    pages = torch.zeros(99, dtype=torch.int64)
    pack_entries_triton(arena, selected, pages, plan)
    commit_tables_triton(tables, arena, selected, plan, pages, scores)
    head_tables_triton(tables, slots, seq_lens, layers, heads, 400)


def usage(kernel: Any) -> dict[str, Any]:
    """Read what ptxas noted in the compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "kernel": kernel.metadata.name,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"] + numbers["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "async_copies": kernel.asm["ttgir"].count("ttg.async_copy_global_to_local"),
    }


if __name__ == "__main__":
    original_run = JITFunction.run
    JITFunction.run = compile_only
    driver.set_active(Target())
    launch_all(layers=2, heads=3, group=4, dim=128, window=32)
    launch_all(layers=2, heads=2, group=7, dim=96, window=8)
    launch_decode(heads=2, group=8, dim=64)
    launch_step(heads=8, group=4, dim=128)
    launch_step(heads=2, group=7, dim=96)
    launch_step(heads=2, group=8, dim=64)
    launch_step(heads=3, group=4, dim=128, row_slack=None, max_parts=None)
    for kernel in compiled.values():
        json.dump(usage(kernel), sys.stdout)
        sys.stdout.write("\n")
