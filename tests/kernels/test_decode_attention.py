"""`decode_attention`: arithmetic; compared with float64 and with torch's own error."""

from typing import NamedTuple

import pytest
import torch

from sglang_kvc.kernels import decode_plan, decode_schedule
from sglang_kvc.kernels.append import append_kv, append_kv_ref
from sglang_kvc.kernels.decode_attention import (
    DecodeConfig,
    DecodeWorkspace,
    NewTokens,
    decode_attention,
    decode_attention_ref,
    decode_attention_triton,
    make_decode_workspace,
    plan_decode,
    plan_decode_ref,
    plan_decode_triton,
)
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels import oracles


@pytest.fixture
def one_sm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `programs_per_sm` the number of programs, on every machine."""
    monkeypatch.setattr(decode_schedule, "_num_sms", lambda device: 1)


def make_workspace(
    case: Case, batch: int, config: DecodeConfig | None = None
) -> DecodeWorkspace:
    arena = case.arena
    return make_decode_workspace(
        batch,
        arena.num_kv_heads * case.group,
        arena.head_dim,
        arena.k.device,
        arena.num_kv_heads,
        arena.num_layers,
        config,
    )


def make_batch(
    case: Case, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, slots, seq_lens of one decode step; `padding` rows of slot 0 at the end."""
    ring, device = case.query_ring, case.arena.k.device
    slots = torch.tensor([*case.slots, *[0] * padding], device=device)
    seq_lens = torch.tensor([*case.seq_lens, *[1] * padding], device=device)
    shape = (len(slots), *ring.shape[-2:])
    return torch.randn(shape, dtype=ring.dtype, device=device), slots, seq_lens.int()


def check(
    case: Case, layer: int = 0, padding: int = 0, config: DecodeConfig | None = None
) -> None:
    """Run the kernel in a poisoned, too large workspace; compare with the oracle.

    Also: a second call, which records log-sum-exps, gives the same, and no count of
    arrivals stays behind.
    """
    arena, live = case.arena, len(case.slots)
    q, slots, seq_lens = make_batch(case, padding)
    scale = arena.head_dim**-0.5
    workspace = make_workspace(case, len(slots) + 1, config)
    shape = (arena.num_layers, arena.num_kv_heads)
    plan_decode_triton(case.tables, slots, seq_lens, *shape, workspace, config)
    args = (q, arena, layer, case.tables, slots, seq_lens, scale)
    out = decode_attention_triton(*args, workspace=workspace, config=config)
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    working = decode_attention_ref(*args, upcast=False)
    truth = oracles.decode(case, q[:live], layer, scale)
    oracles.assert_arith(out[:live], working[:live], truth)
    lse = torch.full_like(case.query_lse, torch.nan)
    recording = {"workspace": workspace, "query_lse": lse}
    again = decode_attention_triton(*args, **recording, config=config)
    assert torch.equal(out, again)
    assert not workspace.arrivals.any()
    check_lse(case, q, layer, scale, lse)
    lse.fill_(torch.nan)
    decode_attention_ref(*args, query_lse=lse)
    check_lse(case, q, layer, scale, lse)


def check_lse(
    case: Case, q: torch.Tensor, layer: int, scale: float, lse: torch.Tensor
) -> None:
    """Each request's newest query is recorded, and nothing else but slot 0."""
    rows = torch.tensor(case.seq_lens, device=lse.device) - 1
    slots = torch.tensor(case.slots, device=lse.device)
    cell = (slots, layer, rows % lse.shape[2])
    truth = oracles.decode_lse(case, q[: len(slots)], layer, scale)
    torch.testing.assert_close(lse[cell].double(), truth, atol=1e-3, rtol=0)
    lse[cell] = torch.nan
    assert lse[1:].isnan().all()


LENGTHS = [
    # seq_lens, folds; lengths around a page, around a tile, several tiles.
    ([1], [0]),
    ([15, 16, 17], [0, 0, 0]),
    ([63], [0]),
    ([64, 128], [0, 0]),
    ([100, 500, 33], [0, 256, 32]),
    ([273, 129], [256, 128]),
]


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("programs", [3, 8])
@pytest.mark.parametrize(("seq_lens", "folds"), LENGTHS)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "dtype"),
    [
        (2, 3, 64, torch.float32),
        (1, 7, 96, torch.float16),
        (2, 4, 128, torch.float16),
    ],
)
def test_close_to_truth(
    seq_lens: list[int],
    folds: list[int],
    heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    programs: int,
    device: str,
) -> None:
    case = make_case(
        len(seq_lens), 2, heads, group, dim, seq_lens, folds, dtype=dtype, device=device
    )
    config = DecodeConfig(programs_per_sm=programs)
    check(case, layer=1, padding=len(seq_lens) % 3, config=config)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group: int, device: str) -> None:
    case = make_case(
        2, 1, 1, group, 64, [100, 16], [64, 0], dtype=torch.float16, device=device
    )
    check(case, config=DecodeConfig(tile=32, programs_per_sm=2))


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(
    "switches",
    [
        {"records": False, "row_slack": None},
        {"records": True, "row_slack": None},
        {"records": False, "row_slack": 0},
        {"records": True, "row_slack": 2, "max_parts": 4, "pdl": True},
    ],
    ids=["plain", "records", "aligned", "all"],
)
@pytest.mark.parametrize(
    ("seq_lens", "programs", "min_share"),
    [
        pytest.param([640], 40, 1, id="a-row-over-40-programs"),
        pytest.param([330], 4, 1, id="a-program-inside-a-row"),
        pytest.param([16] * 9, 2, 1, id="nine-rows-a-program"),
        pytest.param([64] * 4, 8, 1, id="a-row-is-a-share"),
        pytest.param([128] * 2, 8, 1, id="a-row-is-two-shares"),
        pytest.param([160, 32, 32, 96], 4, 1, id="a-row-ends-with-a-share"),
        pytest.param([16, 20], 50, 1, id="fewer-tiles-than-programs"),
        pytest.param([16, 20, 90], 50, 4, id="fewer-shares-than-programs"),
        pytest.param([1, 1, 30, 8 * 36, 1, 40, 9, 45], 7, 1, id="skewed"),
        pytest.param([100, 1], 1, 1, id="one-program"),
    ],
)
def test_shares(
    seq_lens: list[int], programs: int, min_share: int, switches: dict, device: str
) -> None:
    case = make_case(len(seq_lens), 1, 2, 2, 64, seq_lens, device=device)
    config = DecodeConfig(16, programs_per_sm=programs, min_share=min_share, **switches)
    check(case, config=config)


@pytest.mark.interpreter
def test_default_programs(device: str) -> None:
    case = make_case(2, 1, 2, 2, 64, [150, 20], [96, 0], device=device)
    check(case)


class HandPlan(NamedTuple):
    """The plan of one layer, tile by tile and row by row."""

    cu_tiles: list[int]
    first_rows: list[int]
    share: int
    records: list[list[int]]


def plan_by_hand(
    case: Case, layer: int, slots: list[int], config: DecodeConfig
) -> HandPlan:
    """Plan live rows, then padding. A record is [slot, .., entries] of one row."""
    sizes, records = [], []
    for b, slot in enumerate(slots):
        for h in range(case.arena.num_kv_heads):
            lh, live = layer * case.arena.num_kv_heads + h, b < len(case.slots)
            n = len(oracles.entries(case, b, lh)) if live else 1
            first, end = case.tables.block_offsets[slot, lh : lh + 2].tolist()
            fold = int(case.tables.fold_lens[slot])
            sizes.append(-(-n // config.tile))
            records.append([slot, first, 16 * (end - first), fold, n])
    programs = config.programs_per_sm
    share = max(config.min_share, -(-sum(sizes) // programs))
    if config.max_parts is not None:
        parts = -(-max(sizes) // config.max_parts)
        # All programs are on one multiprocessor.
        share = max(share, min(parts, sum(sizes)))
    if config.row_slack is not None:
        for wider in range(share, share + config.row_slack + 1):
            whole = [-(-size // wider) for size in sizes]
            if sum(whole) <= programs:
                share, sizes = wider, [count * wider for count in whole]
                break
    owners = [row for row, size in enumerate(sizes) for _ in range(size)]
    starts = [min(p * share, len(owners) - 1) for p in range(programs)]
    cu_tiles = [sum(sizes[:row]) for row in range(len(sizes) + 1)]
    return HandPlan(cu_tiles, [owners[tile] for tile in starts], share, records)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(
    ("programs", "min_share", "chunk", "row_slack", "max_parts"),
    [
        (1, 1, 64, None, None),
        (7, 1, 8, None, None),
        (50, 2, 16, None, None),
        (512, 1, 4, None, None),
        pytest.param(7, 1, 64, 9, None, id="more-rows-than-programs"),
        pytest.param(50, 1, 64, 0, None, id="no-slack"),
        pytest.param(50, 1, 64, 4, None, id="aligned"),
        pytest.param(50, 1, 16, 4, None, id="more-rows-than-a-chunk"),
        pytest.param(512, 1, 64, 1, None, id="every-tile-a-program"),
        pytest.param(512, 1, 4, None, 3, id="three-parts"),
        pytest.param(512, 1, 64, 1, 3, id="three-parts-aligned"),
    ],
)
def test_plan(
    programs: int,
    min_share: int,
    chunk: int,
    row_slack: int | None,
    max_parts: int | None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Skewed rows, rows of one token, padding; prefix sums in several chunks."""
    monkeypatch.setattr(decode_plan, "_PLAN_CHUNK", chunk)
    seq_lens, folds = [1, 60, 1, 2000, 333, 16, 17], [0, 0, 0, 1600, 320, 0, 16]
    case = make_case(7, 2, 2, 1, 16, seq_lens, folds, skew=4.0, device=device)
    _, slots, lengths = make_batch(case, padding=2)
    config = DecodeConfig(
        programs_per_sm=programs,
        min_share=min_share,
        row_slack=row_slack,
        max_parts=max_parts,
    )
    workspace = make_workspace(case, len(slots) + 3, config)
    plan_decode_triton(case.tables, slots, lengths, 2, 2, workspace, config)
    plan = plan_decode_ref(case.tables, slots, lengths, 2, 2, programs, config)
    rows = 2 * len(slots)
    assert torch.equal(workspace.first_rows, plan.first_rows)
    assert torch.equal(workspace.shares, plan.shares)
    records = workspace.records
    assert torch.equal(records[:, programs:][:, :rows, :5], plan.row_records)
    assert torch.equal(records[:, :programs], plan.program_records)
    assert torch.equal(workspace.cu_tiles[:, : rows + 1], plan.cu_tiles)
    if rows > chunk:
        config = config._replace(row_slack=None)
    for layer in range(2):
        by_hand = plan_by_hand(case, layer, slots.tolist(), config)
        first_rows = plan.first_rows[layer].tolist()
        assert plan.cu_tiles[layer].tolist() == by_hand.cu_tiles
        assert first_rows == by_hand.first_rows
        assert plan.shares[layer] == by_hand.share
        assert plan.row_records[layer].tolist() == by_hand.records
        assert plan.program_records[layer].tolist() == [
            [*by_hand.records[row], *by_hand.cu_tiles[row : row + 2], row]
            for row in first_rows
        ]


@pytest.mark.interpreter
def test_idle_multiprocessors_limit_max_parts(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 40 tiles and one of 8 on 12 multiprocessors: no 2 parts of 20 tiles."""
    monkeypatch.setattr(decode_schedule, "_num_sms", lambda device: 12)
    case = make_case(2, 1, 1, 1, 16, [640, 128], device=device)
    _, slots, lengths = make_batch(case)
    for max_parts, share in ((None, 2), (20, 2), (13, 4), (2, 4)):
        config = DecodeConfig(16, max_parts=max_parts, row_slack=None)
        workspace = make_workspace(case, 2, config)
        plan_decode_triton(case.tables, slots, lengths, 1, 1, workspace, config)
        plan = plan_decode_ref(case.tables, slots, lengths, 1, 1, 36, config)
        assert workspace.shares.tolist() == plan.shares.tolist() == [share]


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("programs", [5, 16])
def test_one_plan_serves_all_layers(programs: int, device: str) -> None:
    case = make_case(3, 3, 2, 2, 64, [200, 70, 30], [192, 48, 0], device=device)
    config = DecodeConfig(16, programs_per_sm=programs)
    q, slots, seq_lens = make_batch(case)
    workspace = make_workspace(case, 3, config)
    plan_decode_triton(case.tables, slots, seq_lens, 3, 2, workspace, config)
    for layer in (2, 0, 1):
        args = (q, case.arena, layer, case.tables, slots, seq_lens, 0.125)
        out = decode_attention_triton(*args, workspace=workspace, config=config)
        assert torch.equal(out, decode_attention_triton(*args, config=config))
        torch.testing.assert_close(out, decode_attention_ref(*args))


def test_plan_of_the_reference_path_does_nothing() -> None:
    case = make_case(1, 1, 1, 1, 16, [20])
    _, slots, seq_lens = make_batch(case)
    workspace = make_workspace(case, 1)
    before = workspace.cu_tiles.clone()
    plan_decode(case.tables, slots, seq_lens, 1, 1, workspace)
    assert torch.equal(workspace.cu_tiles, before)


@pytest.mark.interpreter
def test_strided_query_and_given_output(device: str) -> None:
    case = make_case(2, 2, 2, 3, 64, [90, 40], [32, 0], device=device)
    q, slots, seq_lens = make_batch(case)
    fused = torch.randn(2, 10, 64, device=device)
    fused[:, 2:8] = q
    out = torch.full((2, 9, 64), torch.nan, device=device)
    args = (case.arena, 1, case.tables, slots.int(), seq_lens.long(), 0.125)
    got = decode_attention_triton(fused[:, 2:8], *args, out=out[:, 1:7])
    assert got.data_ptr() == out[:, 1:7].data_ptr()
    expected = decode_attention_triton(q, *args)
    assert torch.equal(out[:, 1:7], expected)
    assert out[:, 0].isnan().all()
    assert out[:, 7:].isnan().all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_batch": 1}, "make it with max_batch >= 9"),
        ({"num_kv_heads": 1}, "num_kv_heads=2"),
        ({"num_layers": 1}, "num_layers=3"),
        ({"config": DecodeConfig(programs_per_sm=1)}, "the same config"),
        ({"num_qo_heads": 8}, "not \\(2, 64\\)"),
        ({"head_dim": 128}, "not \\(2, 64\\)"),
    ],
)
def test_unfit_workspace_is_refused(changed: dict, message: str, device: str) -> None:
    case = make_case(9, 3, 2, 2, 64, [90, *[17] * 8], device=device)
    q, slots, seq_lens = make_batch(case)
    shape = {
        "max_batch": 9,
        "num_qo_heads": 4,
        "head_dim": 64,
        "num_kv_heads": 2,
        "num_layers": 3,
    }
    workspace = make_decode_workspace(**{**shape, **changed}, device=device)
    with pytest.raises(ValueError, match=message):
        decode_attention_triton(
            q, case.arena, 0, case.tables, slots, seq_lens, 0.125, workspace=workspace
        )


def test_workspace_bytes_can_be_counted() -> None:
    workspace = make_decode_workspace(
        256, 32, 128, "meta", num_kv_heads=8, num_layers=32
    )
    assert 0 < sum(part.nbytes for part in workspace) < 2**24
    more = make_decode_workspace(
        256, 32, 128, "meta", num_kv_heads=8, config=DecodeConfig(programs_per_sm=16)
    )
    assert more.partial_out.nbytes > workspace.partial_out.nbytes


def test_reference_against_plain_python() -> None:
    case = make_case(2, 2, 2, 2, 16, [52, 19], [32, 0])
    q, slots, seq_lens = make_batch(case)
    out = decode_attention(q, case.arena, 1, case.tables, slots, seq_lens, 0.25)
    keys, values = (c.view(-1, 16) for c in (case.arena.k, case.arena.v))
    for r in range(2):
        for j in range(4):
            rows = [row for row, _ in oracles.entries(case, r, 2 + j // 2)]
            expected = oracles.decode_loop(
                q[r, j].tolist(), keys[rows].tolist(), values[rows].tolist(), 0.25
            )
            torch.testing.assert_close(out[r, j], torch.tensor(expected))


def make_new_tokens(case: Case, slots: torch.Tensor) -> NewTokens:
    """K and V, strided, for the newest positions of `case`, whose cells become NaN."""
    arena, tables = case.arena, case.tables
    last = torch.zeros_like(slots)
    last[: len(case.slots)] = torch.tensor(case.seq_lens, device=slots.device) - 1
    cells = tables.req_to_token[slots, last].long()
    size = (len(slots), 2 * arena.num_kv_heads + 3, arena.head_dim)
    fused = torch.randn(size, device=slots.device).to(arena.k.dtype)
    k, v = fused[:, 1:-2].chunk(2, dim=1)
    live = cells[: len(case.slots)]
    for part, poison in zip(arena, (torch.nan, torch.nan, -1.0), strict=True):
        part[live // 16, :, :, live % 16] = poison
    return NewTokens(k, v, cells, case.query_ring)


def check_new_tokens(
    case: Case, layer: int = 0, padding: int = 0, config: DecodeConfig | None = None
) -> None:
    """One launch writes bit for bit what `append_kv_ref` does, and attends to it."""
    q, slots, seq_lens = make_batch(case, padding)
    live, window = len(case.slots), case.query_ring.shape[2]
    new = make_new_tokens(case, slots)
    mine = case._replace(
        arena=Arena(*(part.clone() for part in case.arena)),
        query_ring=case.query_ring.clone(),
        query_lse=case.query_lse.clone(),
    )
    ring_index = slots * window + (seq_lens.long() - 1) % window
    append_kv_ref(*new[:2], q, case.arena, layer, *new[2:], ring_index)

    scale = case.arena.head_dim**-0.5
    args = (layer, case.tables, slots, seq_lens, scale)
    run = {"query_lse": mine.query_lse, "config": config}
    new = new._replace(query_ring=mine.query_ring)
    out = decode_attention_triton(q, mine.arena, *args, **run, new_tokens=new)
    working = decode_attention_ref(q, case.arena, *args, upcast=False)
    truth = oracles.decode(case, q[:live], layer, scale)
    oracles.assert_arith(out[:live], working[:live], truth)
    check_lse(case, q, layer, scale, mine.query_lse)
    # All but the padding page and the padding slot, where padding rows meet.
    for ours, theirs in zip(mine.arena, case.arena, strict=True):
        torch.testing.assert_close(ours[1:], theirs[1:], atol=0, rtol=0, equal_nan=True)
    assert torch.equal(mine.query_ring[1:], case.query_ring[1:])
    separate = decode_attention_triton(q, case.arena, *args, config=config)
    assert torch.equal(out[:live], separate[:live])


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("programs", [3, 40])
@pytest.mark.parametrize(
    ("seq_lens", "folds", "padding"),
    [
        pytest.param([1, 1], [0, 0], 3, id="first-token"),
        pytest.param([17, 33, 16, 65], [0, 0, 0, 0], 0, id="page-starts-and-ends"),
        pytest.param([65, 129, 200], [64, 128, 176], 2, id="packed-and-tail"),
        pytest.param([640], [0], 0, id="a-row-over-many-programs"),
        pytest.param([16] * 9, [0] * 9, 1, id="many-rows-a-program"),
    ],
)
@pytest.mark.parametrize(
    ("group", "dim", "dtype", "switches"),
    [
        (3, 64, torch.float32, {}),
        (7, 96, torch.float16, {"records": False, "row_slack": None}),
    ],
)
def test_new_tokens_are_stored_and_seen(
    seq_lens: list[int],
    folds: list[int],
    padding: int,
    programs: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    switches: dict,
    device: str,
) -> None:
    case = make_case(
        len(seq_lens), 2, 2, group, dim, seq_lens, folds, dtype=dtype, device=device
    )
    config = DecodeConfig(16, programs_per_sm=programs, **switches)
    check_new_tokens(case, layer=1, padding=padding, config=config)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
def test_new_token_of_a_head_without_others(device: str) -> None:
    """Head 0 kept nothing, and the tail begins with the newest token."""
    case = make_case(2, 1, 2, 2, 64, [33, 65], [32, 64], [2, 3], device=device)
    case.tables.block_offsets[case.slots, 1] = 0
    check_new_tokens(case, config=DecodeConfig(16, programs_per_sm=4))


def test_reference_stores_new_tokens() -> None:
    case = make_case(2, 2, 2, 2, 16, [52, 19], [32, 0], dtype=torch.bfloat16)
    q, slots, seq_lens = make_batch(case, padding=1)
    new = make_new_tokens(case, slots)
    args = (q, case.arena, 1, case.tables, slots, seq_lens, 0.25)
    out = decode_attention(*args, new_tokens=new)
    for b, (slot, last) in enumerate(zip(case.slots, (51, 18), strict=True)):
        page, offset = divmod(int(new.out_cache_loc[b]), 16)
        assert torch.equal(case.arena.k[page, 1, :, offset], new.k[b])
        assert torch.equal(case.arena.v[page, 1, :, offset], new.v[b])
        assert not case.arena.score[page, 1, :, offset].any()
        assert torch.equal(case.query_ring[slot, 1, last % 8], q[b])
    assert torch.equal(out, decode_attention(*args))


@pytest.mark.interpreter
def test_rings_of_other_lengths_are_refused(device: str) -> None:
    case = make_case(1, 1, 1, 1, 16, [20], device=device)
    q, slots, seq_lens = make_batch(case)
    new = make_new_tokens(case, slots)
    args = (q, case.arena, 0, case.tables, slots, seq_lens, 0.25)
    with pytest.raises(ValueError, match="\\[3, 8\\] rows"):
        decode_attention_triton(
            *args, query_lse=case.query_lse[:, :, :3], new_tokens=new
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "group", "dtype"),
    [
        (64, 1, torch.bfloat16),
        (64, 3, torch.float16),
        (64, 8, torch.bfloat16),
        (96, 4, torch.bfloat16),
        (128, 1, torch.float16),
        (128, 4, torch.bfloat16),
        (128, 7, torch.bfloat16),
        (128, 8, torch.float16),
    ],
)
@pytest.mark.parametrize(
    ("seq_lens", "folds", "padding"),
    [
        ([1, 17, 64, 65], [0, 0, 0, 0], 3),
        ([1000, 4097, 333], [512, 4096, 0], 0),
        ([40_000, 40_001, 20], [0, 32_000, 0], 2),
        ([129 + 37 * i for i in range(130)], [128] * 130, 6),
    ],
    ids=["short", "middle", "long", "batch136"],
)
@pytest.mark.parametrize(
    "switches",
    [{}, {"records": False, "row_slack": None}, {"max_parts": 16, "pdl": True}],
    ids=["default", "plain", "switched"],
)
def test_gpu_sweep(
    seq_lens: list[int],
    folds: list[int],
    padding: int,
    dim: int,
    group: int,
    dtype: torch.dtype,
    switches: dict,
    device: str,
) -> None:
    case = make_case(
        len(seq_lens),
        2,
        2,
        group,
        dim,
        seq_lens,
        folds,
        skew=4.0,
        dtype=dtype,
        device=device,
        window=1,
        spare_pages=0,
    )
    config = decode_schedule.default_config(dim)._replace(**switches)
    check(case, layer=1, padding=padding, config=config)
    check_new_tokens(case, layer=1, padding=padding, config=config)


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths(device: str) -> None:
    case = make_case(
        4,
        2,
        2,
        4,
        128,
        [700, 90, 16, 300],
        [512, 0, 0, 0],
        dtype=torch.bfloat16,
        device=device,
    )
    q, slots, seq_lens = make_batch(case)
    short = torch.tensor([600, 33, 1, 17], dtype=torch.int32, device=device)
    lengths = short.clone()
    workspace = make_workspace(case, 4)
    out = torch.empty_like(q)
    args = (q, case.arena, 1, case.tables, slots, lengths, 128**-0.5, out, workspace)

    def step() -> None:
        plan_decode(case.tables, slots, lengths, 2, 2, workspace)
        decode_attention(*args)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in (seq_lens, short):
        lengths.copy_(now)
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        step()
        assert torch.equal(replayed, out)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 49, 900])
def test_gpu_graph_of_layers_with_new_tokens(
    tokens: int, pdl: bool, device: str
) -> None:
    """Replays, each with K, V of its own a layer, equal append and decode, bit by bit.

    Every replay overwrites the cells: one that read the old ones would show.
    """
    layers, batch = 6, 16
    shape = {"dtype": torch.bfloat16, "device": device}
    case = make_case(batch, layers, 8, 4, 128, [tokens] * batch, **shape)
    q, slots, seq_lens = make_batch(case, padding=3)
    cells = make_new_tokens(case, slots).out_cache_loc
    ring_index = slots * 8 + (seq_lens.long() - 1) % 8
    config = decode_schedule.default_config(128)._replace(pdl=pdl)
    workspace = make_workspace(case, len(slots), config)
    kvs = [torch.randn(layers, len(slots), 8, 128, **shape) for _ in range(2)]
    outs = [torch.empty_like(q) for _ in range(layers)]
    lses = [case.query_lse.clone() for _ in range(2)]

    def step(fused: bool) -> None:
        plan_decode_triton(case.tables, slots, seq_lens, layers, 8, workspace, config)
        for layer, out in enumerate(outs):
            k, v = (part[layer] for part in kvs)
            new = NewTokens(k, v, cells, case.query_ring) if fused else None
            if not fused:
                arena = (case.arena, layer, cells, case.query_ring, ring_index)
                append_kv(k, v, q, *arena)
            args = (q, case.arena, layer, case.tables, slots, seq_lens, 0.1, out)
            rest = (workspace, lses[fused], new, config)
            decode_attention_triton(*args, *rest)

    step(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(True)
    for _ in range(20):
        for part in (*kvs, q):
            part.normal_()
        graph.replay()
        outputs = [out[:batch].clone() for out in outs]
        written = [part[1:].clone() for part in (*case.arena, case.query_ring)]
        step(False)
        for ours, theirs in zip(outputs, outs, strict=True):
            assert torch.equal(ours, theirs[:batch])
        for ours, theirs in zip(written, (*case.arena, case.query_ring), strict=True):
            assert torch.equal(ours.nan_to_num(7.0), theirs[1:].nan_to_num(7.0))
        ours, theirs = (part[1:].nan_to_num(7.0) for part in lses)
        assert torch.equal(ours, theirs)
    assert not workspace.arrivals.any()


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [16, 64])
def test_gpu_skewed_lengths_have_no_race(tile: int, device: str) -> None:
    """B = 64, H = 8, mean 1000: right, and bitwise the same in 100 calls."""
    seq_lens = [8000, *[300 + 19 * i for i in range(62)], 1]
    folds = [
        (n - 1) // 16 * 16 // (1 + i % 2) // 16 * 16 for i, n in enumerate(seq_lens)
    ]
    case = make_case(
        64,
        1,
        8,
        4,
        128,
        seq_lens,
        folds,
        skew=4.0,
        dtype=torch.bfloat16,
        device=device,
        window=1,
        spare_pages=0,
    )
    config = decode_schedule.default_config(128)._replace(tile=tile)
    check(case, config=config)
    q, slots, lengths = make_batch(case)
    workspace = make_workspace(case, 64, config)
    plan_decode_triton(case.tables, slots, lengths, 1, 8, workspace, config)
    args = (q, case.arena, 0, case.tables, slots, lengths, 0.1, None, workspace, config)
    first = decode_attention_triton(*args)
    for _ in range(100):
        assert torch.equal(decode_attention_triton(*args), first)
    assert not workspace.arrivals.any()
