"""Compile every kernel for one kind of GPU, without a GPU.

``python -m tests.kernels.compile_gpus 90 [all | usual]`` (80: A100, 89: L40S, 90: H200,
100: B200). Kernels that read or write K and V are compiled for more shapes and for an
e4m3 cache. Where it is not sm90, only the most usual shape is compiled, and decode for
the largest ones, to save time, unless ``all`` is given; with ``usual`` for sm90, too.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sglang_kvc.kernels.decode_attention import NewTokens, decode_attention_triton
from sglang_kvc.kernels.decode_schedule import default_config
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.kernels.ops import OPS, Op
from sglang_kvc.kernels.testing import make_case
from tests.kernels.touch_kv import TOUCH_KV

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
compiled: dict[str, Any] = {}
KV_OPS = [op for op in OPS if op.name in TOUCH_KV]
"""The others know neither the dtype nor the shape of K and V."""
PASS_OPS = [op for op in KV_OPS if op.name != "decode_attention"]


class Target:
    """A driver for compilation only."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

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
    case = make_case(
        lengths,
        [256, 128],
        layers=2,
        kv_heads=heads,
        group=group,
        head_dim=dim,
        dtype=torch.bfloat16,
    )
    q = torch.randn(2, heads * group, dim, dtype=torch.bfloat16)
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(lengths)
    decode_attention_triton(
        case.arena, case.tables, q, slots, seq_lens, layer=1, sm_scale=0.1
    )


def launch_step(
    heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    **switches: Any,
) -> None:
    """Call the decode wrappers as servers do: new tokens, rings, maybe switches."""
    lengths = [5000, 333]
    case = make_case(
        lengths,
        [256, 128],
        layers=2,
        kv_heads=heads,
        group=group,
        head_dim=dim,
        dtype=dtype,
        query_dtype=torch.bfloat16,
    )
    q = torch.randn(2, heads * group, dim, dtype=torch.bfloat16)
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(lengths)
    decode_attention_triton(
        case.arena,
        case.tables,
        q,
        slots,
        seq_lens,
        layer=1,
        sm_scale=0.1,
        query_lse=case.query_lse,
        new_tokens=NewTokens(q[:, :heads], q[:, :heads], slots, case.query_ring),
        config=default_config(dim, group, byte_cells=dtype == E4M3)._replace(
            **switches
        ),
    )


def launch_all(
    layers: int,
    heads: int,
    group: int,
    dim: int,
    window: int,
    dtype: torch.dtype = torch.bfloat16,
    ops: Sequence[Op] = OPS,
) -> None:
    """Call the kernels of `ops`."""
    kind = {"dtype": dtype, "query_dtype": torch.bfloat16, "window": window}
    for folds in ([256, 128], None):
        case = make_case(
            [5000, 333],
            folds,
            layers=layers,
            kv_heads=heads,
            group=group,
            head_dim=dim,
            **kind,
        )
        for op in ops:
            for args, settings in op.make_calls(case):
                op.kernel(*args, **settings)


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


def stores_bytes(kernel: Any) -> bool:
    """Whether its K and V are bytes; queries in a ring always are."""
    types = kernel.src.signature.items()
    return "*u8" in str([kind for name, kind in types if name not in OF_QUERIES])


WIDE = ((16, 64), (5, 80), (12, 128), (16, 128), (8, 256))
"""Query heads a KV head, head_dim."""
LARGEST = WIDE[-2:]
OF_QUERIES = {"ring_k", "ring_v", "ring_pages", "new"}
"""Arguments of kernels in which queries are stored, or stand as the model made them."""

if __name__ == "__main__":
    original_run = JITFunction.run
    JITFunction.run = compile_only
    driver.set_active(Target(int(sys.argv[1])))
    every = sys.argv[1:] == ["90"] or "all" in sys.argv[2:]
    launch_all(layers=2, heads=3, group=4, dim=128, window=32)
    launch_step(heads=8, group=4, dim=128)
    if every:
        launch_all(layers=2, heads=2, group=7, dim=96, window=8, ops=KV_OPS)
        launch_decode(heads=2, group=8, dim=64)
        launch_step(heads=2, group=7, dim=96)
        launch_step(heads=2, group=8, dim=64)
        launch_step(heads=3, group=4, dim=128, row_slack=None, max_parts=None)
    usual = set(compiled)
    for group, dim in WIDE if every else LARGEST:
        if every:
            # Decode as servers do it: the next line.
            launch_all(2, heads=2, group=group, dim=dim, window=32, ops=PASS_OPS)
        launch_step(heads=2, group=group, dim=dim)
    wide = set(compiled)
    bytes_ = {"dtype": E4M3, "ops": KV_OPS}
    launch_all(layers=2, heads=3, group=4, dim=128, window=32, **bytes_)
    launch_step(heads=8, group=4, dim=128, dtype=E4M3)
    if every:
        launch_step(heads=2, group=8, dim=64, dtype=E4M3)
    usual |= set(compiled) - wide
    if every:
        launch_all(layers=2, heads=2, group=16, dim=128, window=32, **bytes_)
    for key, kernel in compiled.items():
        about = {"usual": key in usual, "e4m3": stores_bytes(kernel)}
        json.dump({**usage(kernel), **about}, sys.stdout)
        sys.stdout.write("\n")
