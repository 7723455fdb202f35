"""`append_kv`: a move; bit-equal, and no other cell changes."""

import pytest
import torch

from sglang_kvc.kernels.append import append_kv, append_kv_ref, append_kv_triton
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.kernels.testing import Case, make_case

CELLS = "k", "v", "score"
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(case: Case, tokens: int, fused: bool, padding: int) -> Inputs:
    """k, v, q, out_cache_loc and ring_index of random tokens; some are not recorded.

    `fused` makes k, v and q slices of one projection; the last `padding` rows all
    write token 0.
    """
    arena, ring = case.arena, case.query_ring
    slots, _, window, q_heads, dim = ring.shape
    heads, device = arena.num_kv_heads, arena.k.device
    sizes = [heads, heads, q_heads]
    if fused:
        flat = torch.randn(tokens, sum(sizes) * dim, dtype=ring.dtype, device=device)
        parts = flat.split([size * dim for size in sizes], dim=1)
        k, v, q = (p.unflatten(1, (-1, dim)) for p in parts)
    else:
        shapes = [(tokens, size, dim) for size in sizes]
        k, v, q = (torch.randn(s, dtype=ring.dtype, device=device) for s in shapes)
    cells = torch.randperm((arena.k.shape[0] - 1) * 16, device=device)[:tokens] + 16
    rows = torch.full((tokens,), -1, device=device)
    recorded = min(tokens, slots * window)
    rows[:recorded] = torch.randperm(slots * window, device=device)[:recorded]
    rows[1::3] = -1
    if padding:
        cells[-padding:], rows[-padding:] = 0, -1
    return k, v, q, cells, rows


def copy(case: Case) -> tuple[Arena, torch.Tensor]:
    """The mutable inputs, so that reference and kernel start from the same."""
    return case.arena.clone(), case.query_ring.clone()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers that are equal iff the tensor's bits are: NaN equals itself."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "dim", "dtype"),
    [
        (1, 1, 1, 64, torch.bfloat16),
        (17, 2, 3, 96, torch.float16),
        (15, 3, 7, 128, torch.float32),
        (33, 2, 4, 64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_equals_reference(
    tokens: int,
    heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    fused: bool,
    device: str,
) -> None:
    case = make_case(
        [90, 30],
        layers=3,
        kv_heads=heads,
        group=group,
        head_dim=dim,
        dtype=dtype,
        device=device,
        window=24,
    )
    k, v, q, cells, rows = make_inputs(case, tokens, fused, padding=0)
    arena, ring = copy(case)
    expected, expected_ring = copy(case)
    append_kv_triton(arena, k, v, q, cells, ring, rows, layer=1)
    append_kv_ref(expected, k, v, q, cells, expected_ring, rows, layer=1)
    for name in CELLS:
        assert torch.equal(bits(getattr(arena, name)), bits(getattr(expected, name)))
    assert torch.equal(bits(ring), bits(expected_ring))


@pytest.mark.interpreter
def test_padding_rows_touch_only_the_padding_page(device: str) -> None:
    case = make_case([40, 30], layers=2, group=2, head_dim=64, device=device, window=24)
    k, v, q, cells, rows = make_inputs(case, 9, True, padding=5)
    arena, ring = copy(case)
    expected, expected_ring = copy(case)
    append_kv_triton(arena, k, v, q, cells, ring, rows, layer=0)
    append_kv_ref(expected, k, v, q, cells, expected_ring, rows, layer=0)
    for name in CELLS:
        ours, theirs = getattr(arena, name)[1:], getattr(expected, name)[1:]
        assert torch.equal(bits(ours), bits(theirs))
    assert torch.equal(ring, expected_ring)


def test_reference_against_a_loop() -> None:
    case = make_case(
        [40, 30], layers=2, group=3, head_dim=64, dtype=torch.bfloat16, window=24
    )
    k, v, q, cells, rows = make_inputs(case, 20, True, padding=0)
    arena, ring = copy(case)
    append_kv(arena, k, v, q, cells, ring, rows, layer=1)
    expected, expected_ring = copy(case)
    for n, (token, row) in enumerate(zip(cells.tolist(), rows.tolist(), strict=True)):
        page, offset = divmod(token, 16)
        for h in range(2):
            expected.k[page, 1, h, offset] = k[n, h]
            expected.v[page, 1, h, offset] = v[n, h]
            expected.score[page, 1, h, offset] = 0
        if row >= 0:
            slot, position = divmod(row, 24)
            expected_ring[slot, 1, position] = q[n]
    for name in CELLS:
        assert torch.equal(bits(getattr(arena, name)), bits(getattr(expected, name)))
    assert torch.equal(ring, expected_ring)


@pytest.mark.gpu
def test_long_prefill_beyond_int32(device: str) -> None:
    # 40,000 pages x 4 x 8 x 16 x 128 = 2.6e9 elements of K and as many of V.
    case = make_case(
        [64],
        layers=4,
        kv_heads=8,
        group=4,
        head_dim=128,
        dtype=torch.bfloat16,
        device=device,
        spare_pages=40_000,
    )
    k, v, q, cells, rows = make_inputs(case, 8192, True, padding=0)
    last = torch.tensor([case.arena.k.shape[0] * 16 - 1], device=device)
    one = slice(0, 1)
    append_kv_triton(
        case.arena, k[one], v[one], q[one], last, case.query_ring, rows[one], layer=3
    )
    assert torch.equal(case.arena.k[-1, 3, :, 15], k[0])
    assert torch.equal(case.arena.v[-1, 3, :, 15], v[0])
    expected, expected_ring = copy(case)
    append_kv_triton(case.arena, k, v, q, cells, case.query_ring, rows, layer=2)
    append_kv_ref(expected, k, v, q, cells, expected_ring, rows, layer=2)
    assert torch.equal(bits(case.arena.k), bits(expected.k))
    assert torch.equal(bits(case.arena.v), bits(expected.v))
    assert torch.equal(case.query_ring, expected_ring)
