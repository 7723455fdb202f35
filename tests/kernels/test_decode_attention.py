"""`decode_attention`: arithmetic; compared with float64 and with torch's own error."""

import pytest
import torch

from sglang_kvc.kernels.decode_attention import (
    DecodeConfig,
    decode_attention,
    decode_attention_triton,
    plan_decode,
    plan_decode_triton,
)
from sglang_kvc.kernels.decode_schedule import default_config
from sglang_kvc.kernels.testing import make_case
from tests.kernels import oracles
from tests.kernels.decode_checks import (
    check,
    check_new_tokens,
    make_batch,
    make_workspace,
)
from tests.kernels.decode_checks import one_sm as one_sm

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
        (2, 5, 80, torch.float16),
        (1, 3, 256, torch.float16),
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
        seq_lens,
        folds,
        layers=2,
        kv_heads=heads,
        group=group,
        head_dim=dim,
        dtype=dtype,
        device=device,
    )
    config = DecodeConfig(programs_per_sm=programs)
    check(case, layer=1, padding=len(seq_lens) % 3, config=config)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("group", range(1, 17))
def test_groups(group: int, device: str) -> None:
    case = make_case(
        [100, 16],
        [64, 0],
        layers=1,
        kv_heads=1,
        group=group,
        head_dim=64,
        dtype=torch.float16,
        device=device,
    )
    check(case, config=DecodeConfig(tile=32, programs_per_sm=2))


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"row_slack": None, "max_parts": None},
        {"row_slack": 0, "max_parts": None},
        {"row_slack": 2, "max_parts": 4},
        {"max_parts": None, "merge_values": 256},
    ],
    ids=[
        "default",
        "unaligned-many-parts",
        "aligned-many-parts",
        "four-parts",
        "many-rounds",
    ],
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
    case = make_case(seq_lens, layers=1, group=2, head_dim=64, device=device)
    config = DecodeConfig(16, programs_per_sm=programs, min_share=min_share, **switches)
    check(case, config=config)


@pytest.mark.interpreter
def test_default_programs(device: str) -> None:
    case = make_case([150, 20], [96, 0], layers=1, group=2, head_dim=64, device=device)
    check(case)


@pytest.mark.interpreter
def test_strided_query_and_given_output(device: str) -> None:
    case = make_case([90, 40], [32, 0], layers=2, group=3, head_dim=64, device=device)
    q, slots, seq_lens = make_batch(case)
    fused = torch.randn(2, 10, 64, device=device)
    fused[:, 2:8] = q
    out = torch.full((2, 9, 64), torch.nan, device=device)
    lengths, how = (slots.int(), seq_lens.long()), {"layer": 1, "sm_scale": 0.125}
    into = {**how, "out": out[:, 1:7]}
    where = (case.arena, case.tables)
    got = decode_attention_triton(*where, fused[:, 2:8], *lengths, **into)
    assert got.data_ptr() == out[:, 1:7].data_ptr()
    expected = decode_attention_triton(*where, q, *lengths, **how)
    assert torch.equal(out[:, 1:7], expected)
    assert out[:, 0].isnan().all()
    assert out[:, 7:].isnan().all()


def test_reference_against_plain_python() -> None:
    case = make_case([52, 19], [32, 0], layers=2, group=2, head_dim=16)
    q, slots, seq_lens = make_batch(case)
    args = (case.arena, case.tables, q, slots, seq_lens)
    out = decode_attention(*args, layer=1, sm_scale=0.25)
    keys, values = (c.view(-1, 16) for c in (case.arena.k, case.arena.v))
    for r in range(2):
        for j in range(4):
            rows = [row for row, _ in oracles.entries(case, r, 2 + j // 2)]
            expected = oracles.decode_loop(
                q[r, j].tolist(), keys[rows].tolist(), values[rows].tolist(), 0.25
            )
            torch.testing.assert_close(out[r, j], torch.tensor(expected))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "group", "dtype", "switches"),
    [
        (64, 1, torch.bfloat16, {}),
        (64, 3, torch.float16, {}),
        (64, 3, torch.float16, {"max_parts": None}),
        (64, 8, torch.bfloat16, {}),
        (96, 4, torch.bfloat16, {}),
        (128, 1, torch.float16, {}),
        (128, 4, torch.bfloat16, {}),
        (128, 4, torch.bfloat16, {"row_slack": None, "max_parts": None}),
        (128, 7, torch.bfloat16, {}),
        (128, 8, torch.float16, {}),
        (128, 8, torch.bfloat16, {"max_parts": None, "merge_values": 16384}),
        (128, 12, torch.bfloat16, {}),
        (128, 16, torch.bfloat16, {}),
        (64, 16, torch.bfloat16, {}),
        (80, 5, torch.bfloat16, {}),
        (256, 1, torch.bfloat16, {}),
        (256, 8, torch.bfloat16, {}),
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
        seq_lens,
        folds,
        layers=2,
        group=group,
        head_dim=dim,
        skew=4.0,
        dtype=dtype,
        device=device,
        window=1,
        spare_pages=0,
    )
    config = default_config(dim, group)._replace(**switches)
    check(case, layer=1, padding=padding, config=config)
    check_new_tokens(case, layer=1, padding=padding, config=config)


@pytest.mark.gpu
def test_graph_replay_follows_new_lengths(device: str) -> None:
    case = make_case(
        [700, 90, 16, 300],
        [512, 0, 0, 0],
        layers=2,
        group=4,
        head_dim=128,
        dtype=torch.bfloat16,
        device=device,
    )
    q, slots, seq_lens = make_batch(case)
    short = torch.tensor([600, 33, 1, 17], dtype=torch.int32, device=device)
    lengths = short.clone()
    workspace = make_workspace(case, 4)
    out = torch.empty_like(q)
    args = (case.arena, case.tables, q, slots, lengths)
    how = {"layer": 1, "sm_scale": 128**-0.5, "out": out, "workspace": workspace}

    def step() -> None:
        plan_decode(case.tables, slots, lengths, workspace, num_kv_heads=2)
        decode_attention(*args, **how)

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
@pytest.mark.parametrize("tile", [16, 64])
def test_gpu_skewed_lengths_have_no_race(tile: int, device: str) -> None:
    """B = 64, H = 8, mean 1000: right, and bitwise the same in 100 calls."""
    seq_lens = [8000, *[300 + 19 * i for i in range(62)], 1]
    folds = [
        (n - 1) // 16 * 16 // (1 + i % 2) // 16 * 16 for i, n in enumerate(seq_lens)
    ]
    case = make_case(
        seq_lens,
        folds,
        layers=1,
        kv_heads=8,
        group=4,
        head_dim=128,
        skew=4.0,
        dtype=torch.bfloat16,
        device=device,
        window=1,
        spare_pages=0,
    )
    config = default_config(128)._replace(tile=tile)
    check(case, config=config)
    q, slots, lengths = make_batch(case)
    workspace = make_workspace(case, 64, config)
    batch = (case.tables, slots, lengths)
    plan_decode_triton(*batch, workspace, num_kv_heads=8, config=config)
    args = (case.arena, case.tables, q, slots, lengths)
    how = {"layer": 0, "sm_scale": 0.1, "workspace": workspace, "config": config}
    first = decode_attention_triton(*args, **how)
    for _ in range(100):
        assert torch.equal(decode_attention_triton(*args, **how), first)
    assert not workspace.arrivals.any()
