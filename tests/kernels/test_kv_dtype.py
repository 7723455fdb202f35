"""An e4m3 cache: conversion bit for bit, and every op as on the same KVs in fp32.

Triton's interpreter rounds wrongly on the way to e4m3 and reads its NaN as 480, so the
kernels of this lane convert with integers, as they do on GPUs before sm89. On a newer
GPU the same tests take the instruction.
"""

import pytest
import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.append import append_kv_ref, append_kv_triton
from sglang_kvc.kernels.decode_attention import (
    DecodeConfig,
    decode_attention_ref,
    decode_attention_triton,
    plan_decode_triton,
)
from sglang_kvc.kernels.kv_dtype import (
    E4M3,
    E4M3_MAX,
    gather_rows,
    kv_scales,
    narrow,
    narrow_ref,
    stored_bytes,
    widen,
)
from sglang_kvc.kernels.ops import OPS, Op, outcome
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels import oracles
from tests.kernels.decode_checks import make_batch, make_workspace, one_sm

__all__ = ["one_sm"]

FOLDS = [0, 144, 96]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def case(device: str, query_dtype: torch.dtype = torch.float32) -> Case:
    """Three requests, two of them packed, in e4m3 with scales."""
    return make_case(
        [70, 160, 227],
        FOLDS,
        layers=2,
        group=3,
        head_dim=32,
        dtype=E4M3,
        query_dtype=query_dtype,
        device=device,
    )


def in_fp32(made: Case) -> Case:
    """The same with a cache in fp32, scales multiplied in.

    Where a packed block lies says nothing of its layer: its owner does.
    """
    arena = made.arena
    rows = torch.arange(arena.score.numel(), device=arena.k.device)
    wide = [gather_rows(cells, rows) for cells in arena[:2]]
    for r in range(len(made.slots)):
        for lh in range(arena.heads_per_page):
            own = [row for row, _ in oracles.entries(made, r, lh)]
            for part, scale in zip(wide, arena.scales.T[lh // 2], strict=True):
                part[own] *= scale
    k, v = (part.view(arena.k.shape) for part in wide)
    return made._replace(arena=arena._replace(k=k, v=v, scales=None))


@triton.jit
def widen_kernel(stored, wide, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(wide + i, widen(tl.load(stored + i), wide.dtype.element_ty))


@triton.jit
def narrow_kernel(wide, stored, scales, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(stored + i, narrow(tl.load(wide + i), tl.load(scales), stored))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_byte_is_read_as_torch_reads_it(dtype: torch.dtype, device: str) -> None:
    stored = torch.arange(256, device=device).to(torch.uint8)
    wide = torch.empty(256, dtype=dtype, device=device)
    widen_kernel[(1,)](stored, wide, 256)
    truth = stored.view(E4M3).to(dtype)
    torch.testing.assert_close(wide, truth, rtol=0, atol=0, equal_nan=True)
    some = ~truth.isnan()
    assert torch.equal(wide.signbit()[some], truth.signbit()[some])


def awkward(dtype: torch.dtype, device: str) -> torch.Tensor:
    """Values of all sizes, all ties between bytes, and what does not fit."""
    bytes_ = torch.arange(127, device=device).to(torch.uint8).view(E4M3).float()
    ties = (bytes_[1:] + bytes_[:-1]) / 2
    power = torch.randint(-13, 10, (3000,), device=device)
    drawn = torch.randn(3000, device=device) * 2.0**power
    special = torch.tensor([0.0, 448.1, 464, 1e4, 3e4, torch.inf, torch.nan])
    some = torch.cat([bytes_, ties, drawn, special.to(device)])
    return torch.cat([some, -some]).to(dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_value_is_stored_as_torch_stores_it(
    dtype: torch.dtype, scale: float, device: str
) -> None:
    wide = awkward(dtype, device)
    size = triton.next_power_of_2(len(wide))
    wide = torch.nn.functional.pad(wide, (0, size - len(wide)))
    stored = torch.empty(size, dtype=torch.uint8, device=device)
    scales = torch.tensor([scale], device=device)
    narrow_kernel[(1,)](wide, stored, scales, size)
    assert torch.equal(stored, stored_bytes(narrow_ref(wide, scales[0], E4M3)))


def test_what_is_stored_is_the_nearest_and_at_most_448() -> None:
    wide = awkward(torch.float32, "cpu")
    bytes_ = torch.arange(256).to(torch.uint8).view(E4M3).float()
    finite = bytes_[bytes_.isfinite()]
    stored = narrow_ref(wide, torch.tensor(2.0), E4M3).float() * 2
    expected = (wide[:, None].double() - 2 * finite.double()).abs().amin(1)
    some = wide.isfinite()
    assert torch.equal((stored.double() - wide.double()).abs()[some], expected[some])
    assert stored[wide == torch.inf].eq(2 * E4M3_MAX).all()
    assert torch.equal(stored.isnan(), wide.isnan())


@pytest.mark.interpreter
@each_op
def test_kernel_equals_reference(op: Op, device: str) -> None:
    """Bit for bit what they move, or within what the op allows."""
    for call in op.make_calls(case(device)):
        ours, theirs = outcome(op.kernel, call), outcome(op.reference, call)
        for mine, other in zip(ours, theirs, strict=True):
            close = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
            if op.tolerance and other.dtype.itemsize > 1 and other.is_floating_point():
                largest = other[other.isfinite()].abs().max()
                close["atol"] = op.tolerance * float(largest)
            torch.testing.assert_close(stored_bytes(mine), stored_bytes(other), **close)


@pytest.mark.parametrize(
    "op",
    [op for op in OPS if op.name in ("decode_attention", "observe_scores", "key_diff")],
    ids=lambda op: op.name,
)
def test_reference_is_that_of_the_same_kvs_in_fp32(op: Op) -> None:
    """The scale of every layer is counted where it belongs."""
    made = case("cpu")
    pairs = zip(op.make_calls(made), op.make_calls(in_fp32(made)), strict=True)
    for call, wide_call in pairs:
        if "new_tokens" in call.settings:
            # What is stored now is rounded in one of them only.
            continue
        found, wide = (op.reference(*c.args, **c.settings) for c in (call, wide_call))
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(found, wide, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("head_dim", [32, 80])
def test_decode_errs_at_most_twice_as_much_as_torch(head_dim: int, device: str) -> None:
    """Against fp64 on the stored KVs; torch works in the model's dtype."""
    made = make_case(
        [70, 160, 227],
        FOLDS,
        layers=2,
        group=3,
        head_dim=head_dim,
        dtype=E4M3,
        query_dtype=torch.float16,
        device=device,
    )
    q, slots, seq_lens = make_batch(made)
    config = DecodeConfig(programs_per_sm=5)
    workspace = make_workspace(made, len(slots), config)
    batch, heads = (made.tables, slots, seq_lens), made.arena.num_kv_heads
    plan_decode_triton(*batch, workspace, num_kv_heads=heads, config=config)
    args = (made.arena, made.tables, q, slots, seq_lens)
    how = {"layer": 1, "sm_scale": head_dim**-0.5}
    out = decode_attention_triton(*args, **how, workspace=workspace, config=config)
    working = decode_attention_ref(*args, **how, upcast=False)
    truth = oracles.decode(in_fp32(made), q, 1, how["sm_scale"])
    oracles.assert_arith(out, working, truth)


@pytest.mark.interpreter
@pytest.mark.parametrize("append", [append_kv_ref, append_kv_triton])
def test_what_is_appended_is_read_back_within_half_a_step(append, device: str) -> None:
    made = case(device)
    arena = made.arena
    k, v = torch.randn(2, 5, 2, 32, device=device)
    q = torch.randn(5, 6, 32, device=device)
    cells = torch.arange(16, 21, device=device)
    rows = torch.full_like(cells, -1)
    append(arena, k, v, q, cells, made.query_ring, rows, layer=1)
    for part, new, scale in zip(arena[:2], (k, v), kv_scales(arena, 1), strict=True):
        stored = stored_bytes(part)[1, 1].view(E4M3).float()[:, :5].transpose(0, 1)
        # Three bits behind the leading one; below 2 ** -6 the steps are equal.
        step = (new.abs() / 16).clamp_min(scale * 2**-10)
        assert ((stored * scale - new).abs() <= step * 1.001).all()
