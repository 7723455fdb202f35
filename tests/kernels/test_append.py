"""`append_kv`: bit-equal, and no other cell changes."""

import pytest
import torch

from sglang_kvc.kernels.append import append_kv, append_kv_ref, append_kv_triton
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.kernels.query_ring import QueryRing
from sglang_kvc.kernels.testing import Case, make_case

CELLS = "k", "v", "score"
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(case: Case, tokens: int, fused: bool, padding: int) -> Inputs:
    """k, v, q, out_cache_loc and ring_index of random tokens; some are not recorded.

    `fused` makes k, v and q slices of one projection; the last `padding` rows all
    write token 0.
    """
    arena, dtype = case.arena, case.query_dtype
    slots, window = len(case.query_ring.pages), case.query_ring.window
    q_heads = case.group * case.arena.num_kv_heads
    heads, dim, device = arena.num_kv_heads, arena.head_dim, arena.k.device
    sizes = [heads, heads, q_heads]
    if fused:
        flat = torch.randn(tokens, sum(sizes) * dim, dtype=dtype, device=device)
        parts = flat.split([size * dim for size in sizes], dim=1)
        k, v, q = (p.unflatten(1, (-1, dim)) for p in parts)
    else:
        shapes = [(tokens, size, dim) for size in sizes]
        k, v, q = (torch.randn(s, dtype=dtype, device=device) for s in shapes)
    cells = torch.randperm((arena.k.shape[0] - 1) * 16, device=device)[:tokens] + 16
    rows = torch.full((tokens,), -1, device=device)
    recorded = min(tokens, slots * window)
    order = torch.randperm(slots * window, device=device)
    # The padding's slot has no ring: the first token must not be one of its.
    has_ring = case.query_ring.pages[order // window, 0] > 0
    order = order.roll(-int(has_ring.nonzero()[0]))
    rows[:recorded] = order[:recorded]
    rows[1::3] = -1
    if padding:
        cells[-padding:], rows[-padding:] = 0, -1
    return k, v, q, cells, rows


def copy(case: Case) -> tuple[Arena, QueryRing]:
    """The mutable inputs, so that reference and kernel start from the same."""
    return case.arena.clone(), case.query_ring.clone()


def check_rings(ours: QueryRing, theirs: QueryRing) -> None:
    """All bytes are equal, those between rings included."""
    assert torch.equal(ours.k, theirs.k)
    assert torch.equal(ours.v, theirs.v)


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
    check_rings(ring, expected_ring)
    assert not torch.equal(ring.k, case.query_ring.k)


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
    check_rings(ring, expected_ring)


def test_reference_against_a_loop() -> None:
    case = make_case(
        [40, 30], layers=2, group=3, head_dim=64, dtype=torch.bfloat16, window=24
    )
    k, v, q, cells, rows = make_inputs(case, 20, True, padding=0)
    arena, ring = copy(case)
    append_kv(arena, k, v, q, cells, ring, rows, layer=1)
    expected, _ = copy(case)
    before, queries = case.queries, {}
    for n, (token, row) in enumerate(zip(cells.tolist(), rows.tolist(), strict=True)):
        page, offset = divmod(token, 16)
        for h in range(2):
            expected.k[page, 1, h, offset] = k[n, h]
            expected.v[page, 1, h, offset] = v[n, h]
            expected.score[page, 1, h, offset] = 0
        if row >= 0:
            slot, position = divmod(row, 24)
            queries[slot, position] = q[n].float()
    for name in CELLS:
        assert torch.equal(bits(getattr(arena, name)), bits(getattr(expected, name)))
    assert case.queries.equal(before)
    after = case._replace(query_ring=ring).queries.float()
    for (slot, position), query in queries.items():
        if slot:
            # Half a step, which is twice as wide in the first elements.
            step = 2 ** (query.abs().amax(1, keepdim=True) / 123).log2().ceil()
            error = (after[slot, 1, position] - query).abs()
            assert (error[:, :8] <= step).all()
            assert (error[:, 8:] <= step / 2).all()
            before[slot, 1, position] = after[slot, 1, position].to(before.dtype)
    assert before.float().equal(after)


@pytest.mark.interpreter
def test_a_slot_without_a_ring_records_nothing(device: str) -> None:
    case = make_case([40, 30], layers=2, group=2, head_dim=64, device=device, window=24)
    case.query_ring.pages[case.slots[0]] = 0
    k, v, q, cells, _ = make_inputs(case, 2, True, padding=0)
    slots = torch.tensor(case.slots, device=device)
    for append in (append_kv_triton, append_kv_ref):
        arena, ring = copy(case)
        append(arena, k, v, q, cells, ring, slots * 24 + 3, layer=1)
        changed = [
            (mine != other).flatten(1).any(1).nonzero().flatten()
            for mine, other in zip(ring[:2], case.query_ring[:2], strict=True)
        ]
        # Row 3 lies in the first block of K.
        assert changed[0].tolist() == case.query_ring.pages[slots[1], :1].tolist()
        assert not len(changed[1])


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
    check_rings(case.query_ring, expected_ring)
