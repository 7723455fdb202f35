"""Compile every kernel for one kind of GPU, without a GPU.

``python -m tests.kernels.compile_gpus 90 [all | usual]``, or 80 (A100), 86
(A10), 89 (L4, L40S), 90 (H100, H200), 100 (B200). `build` says what of the matrix of
shapes and dtypes is compiled; ``all`` is all of it, in minutes a GPU.

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
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sglang_kvc.kernels.decode_attention import NewTokens, decode_attention_triton
from sglang_kvc.kernels.decode_schedule import default_config
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.kernels.ops import OPS, Op
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels.touch_kv import TOUCH_KV

CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
compiled: dict[str, Any] = {}
KV_OPS = [op for op in OPS if op.name in TOUCH_KV]
"""The others know neither the dtype nor the shape of K and V."""
PASS_OPS = [op for op in KV_OPS if op.name != "decode_attention"]
DTYPES = (torch.bfloat16, torch.float16, E4M3)
TILE_OPS = [op for op in OPS if op.name in ("observe_scores", "packed_prefill")]
"""Besides decode, these alone hold tiles of K in shared memory."""
SIZED_OPS = [op for op in OPS if op.name == "packed_prefill"]
"""They choose their tiles, too, by what there is of it."""


class Shape(NamedTuple):
    """Heads of a model."""

    group: int
    head_dim: int
    kv_heads: int = 2

    @property
    def qo_heads(self) -> int:
        """Query heads."""
        return self.group * self.kv_heads


USUAL = Shape(4, 128, kv_heads=3)
EIGHT = USUAL._replace(kv_heads=8)
NARROW = (Shape(7, 96), Shape(8, 64))
WIDE = (Shape(16, 64), Shape(5, 80), Shape(12, 128), Shape(16, 128), Shape(8, 256))
LARGEST = WIDE[-2:]
"""Most shared memory of decode."""
TIGHT = WIDE[1]
"""Most shared memory of scoring: 160 queries, read again for every tile of keys."""
SMALL = (86, 89)
"""GPUs where a program has 99 KiB of it."""


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


def batch(
    shape: Shape, dtype: torch.dtype, folds: Sequence[int] | None, **kind: Any
) -> Case:
    """Two requests; an e4m3 cache stands beside a bf16 model."""
    query_dtype = torch.bfloat16 if dtype == E4M3 else dtype
    return make_case(
        [5000, 333],
        folds,
        layers=2,
        kv_heads=shape.kv_heads,
        group=shape.group,
        head_dim=shape.head_dim,
        dtype=dtype,
        query_dtype=query_dtype,
        **kind,
    )


def launch_decode(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    """Call the decode wrappers, which plan too, once."""
    case = batch(shape, dtype, [256, 128])
    q = torch.randn(2, shape.qo_heads, shape.head_dim).to(case.query_dtype)
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(case.seq_lens)
    decode_attention_triton(
        case.arena, case.tables, q, slots, seq_lens, layer=1, sm_scale=0.1
    )


def launch_step(
    shape: Shape, dtype: torch.dtype = torch.bfloat16, **switches: Any
) -> None:
    """Call the decode wrappers as servers do: new tokens, rings, maybe switches."""
    case = batch(shape, dtype, [256, 128])
    q = torch.randn(2, shape.qo_heads, shape.head_dim).to(case.query_dtype)
    new = q[:, : shape.kv_heads]
    slots, seq_lens = torch.tensor(case.slots), torch.tensor(case.seq_lens)
    config = default_config(
        shape.head_dim, shape.group, byte_cells=dtype == E4M3
    )._replace(**switches)
    decode_attention_triton(
        case.arena,
        case.tables,
        q,
        slots,
        seq_lens,
        layer=1,
        sm_scale=0.1,
        new_tokens=NewTokens(new, new, slots, case.query_ring),
        config=config,
    )


def launch_ops(
    shape: Shape,
    ops: Sequence[Op],
    dtype: torch.dtype = torch.bfloat16,
    window: int = 32,
) -> None:
    """Call the kernels of `ops`, of an uncompressed batch too."""
    for folds in ([256, 128], None):
        case = batch(shape, dtype, folds, window=window)
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
        "stages": kernel.metadata.num_stages,
        "async_copies": kernel.asm["ttgir"].count("ttg.async_copy_global_to_local"),
    }


def stores_bytes(kernel: Any) -> bool:
    """Whether its K and V are bytes; queries in a ring always are."""
    types = kernel.src.signature.items()
    return "*u8" in str([kind for name, kind in types if name not in OF_QUERIES])


OF_QUERIES = {"ring_k", "ring_v", "ring_pages", "new"}
"""Arguments of kernels in which queries are stored, or stand as the model made them."""


class Built(NamedTuple):
    """Hashes of kernels, by which bounds of spilled bytes they have."""

    usual: set[str]
    unbounded: set[str]


def build(capability: int, extent: str) -> Built:
    """Compile for one GPU.

    Parameters
    ----------
    extent : ``usual``: one shape, decode for the largest two. ``all``: every shape in
        bf16, fp16 and e4m3. Empty: sm90 has every shape in bf16, and the usual one in
        the other dtypes; other GPUs the usual shape in all three, and the shapes that
        take most shared memory of what it has. sm86 runs sm80's code with less of it,
        so it gets only kernels that hold tiles.
    """
    everything = extent == "all"
    shapes = everything or (capability == 90 and not extent)
    few = capability == 86 and not everything
    launch_ops(USUAL, TILE_OPS if few else OPS)
    launch_step(EIGHT)
    if shapes:
        launch_ops(NARROW[0], KV_OPS, window=8)
        launch_decode(NARROW[1])
        for shape in NARROW:
            launch_step(shape)
        launch_step(USUAL, row_slack=None, max_parts=None)
    usual = set(compiled)
    for shape in WIDE if shapes else LARGEST:
        if shapes:
            # Decode as servers do it: the next line.
            launch_ops(shape, PASS_OPS)
        launch_step(shape)
    if capability in SMALL and not shapes:
        launch_ops(TIGHT, TILE_OPS)
    if not shapes and not extent:
        launch_ops(LARGEST[-1], SIZED_OPS)
    wide = set(compiled)
    for dtype in DTYPES[1:]:
        launch_ops(USUAL, TILE_OPS if few or dtype != E4M3 else KV_OPS, dtype)
        launch_step(EIGHT, dtype)
    if shapes:
        launch_step(NARROW[1], E4M3)
    usual |= set(compiled) - wide
    if shapes:
        launch_ops(LARGEST[0], KV_OPS, E4M3)
    bounded = set(compiled)
    if everything:
        for dtype in DTYPES:
            for shape in (*NARROW, *WIDE):
                launch_ops(shape, PASS_OPS, dtype)
                launch_step(shape, dtype)
    return Built(usual, set(compiled) - bounded)


if __name__ == "__main__":
    original_run = JITFunction.run
    JITFunction.run = compile_only
    target = int(sys.argv[1])
    driver.set_active(Target(target))
    built = build(target, "".join(sys.argv[2:]))
    for key, kernel in compiled.items():
        about = {
            "usual": key in built.usual,
            "bounded": key not in built.unbounded,
            "e4m3": stores_bytes(kernel),
        }
        json.dump({**usage(kernel), **about}, sys.stdout)
        sys.stdout.write("\n")
