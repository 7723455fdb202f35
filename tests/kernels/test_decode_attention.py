"""`decode_attention`: arithmetic; compared with float64 and with torch's own error."""

import pytest
import torch

from sglang_kvc.kernels.decode_attention import (
    decode_attention,
    decode_attention_ref,
    decode_attention_triton,
    make_decode_workspace,
)
from sglang_kvc.kernels.testing import Case, make_case
from tests.kernels import oracles


def make_batch(
    case: Case, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, slots, seq_lens of one decode step; `padding` rows of slot 0 at the end."""
    ring, device = case.query_ring, case.arena.k.device
    slots = torch.tensor([*case.slots, *[0] * padding], device=device)
    seq_lens = torch.tensor([*case.seq_lens, *[1] * padding], device=device)
    shape = (len(slots), *ring.shape[-2:])
    return torch.randn(shape, dtype=ring.dtype, device=device), slots, seq_lens.int()


def check(case: Case, layer: int = 0, padding: int = 0) -> None:
    """Run the kernel in a poisoned, too large workspace; compare with the oracle."""
    arena, live = case.arena, len(case.slots)
    q, slots, seq_lens = make_batch(case, padding)
    scale = arena.head_dim**-0.5
    workspace = make_decode_workspace(len(slots) + 1, q.shape[1], q.shape[2], q.device)
    args = (q, arena, layer, case.tables, slots, seq_lens, scale)
    out = decode_attention_triton(*args, workspace=workspace)
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    working = decode_attention_ref(*args, upcast=False)
    truth = oracles.decode(case, q[:live], layer, scale)
    oracles.assert_arith(out[:live], working[:live], truth)


LENGTHS = [
    # seq_lens, folds; lengths around a page, around a tile, several splits.
    ([1], [0]),
    ([15, 16, 17], [0, 0, 0]),
    ([63], [0]),
    ([64, 128], [0, 0]),
    ([100, 500, 33], [0, 256, 32]),
    ([273, 129], [256, 128]),
]


@pytest.mark.interpreter
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
    device: str,
) -> None:
    case = make_case(
        len(seq_lens), 2, heads, group, dim, seq_lens, folds, dtype=dtype, device=device
    )
    check(case, layer=1, padding=len(seq_lens) % 3)


@pytest.mark.interpreter
@pytest.mark.parametrize("group", [1, 8])
def test_groups(group: int, device: str) -> None:
    case = make_case(
        2, 1, 1, group, 64, [100, 16], [64, 0], dtype=torch.float16, device=device
    )
    check(case)


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
def test_small_workspace_is_refused(device: str) -> None:
    case = make_case(9, 1, 2, 2, 64, [900, *[17] * 8], device=device)
    q, slots, seq_lens = make_batch(case)
    workspace = make_decode_workspace(1, 4, 64, device, num_kv_heads=2)
    with pytest.raises(ValueError, match="make it with max_batch >= 9"):
        decode_attention_triton(
            q, case.arena, 0, case.tables, slots, seq_lens, 0.125, workspace=workspace
        )


def test_workspace_fits_every_smaller_batch() -> None:
    for batch in (1, 7, 48, 300):
        largest = make_decode_workspace(300, 32, 128, "meta", num_kv_heads=8)
        exact = make_decode_workspace(batch, 32, 128, "meta", num_kv_heads=8)
        assert exact.partial_lse.numel() <= largest.partial_lse.numel()
        unknown = make_decode_workspace(batch, 32, 128, "meta")
        assert exact.partial_lse.numel() <= unknown.partial_lse.numel()


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
def test_gpu_sweep(
    seq_lens: list[int],
    folds: list[int],
    padding: int,
    dim: int,
    group: int,
    dtype: torch.dtype,
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
    check(case, layer=1, padding=padding)


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
    workspace = make_decode_workspace(4, 8, 128, device, num_kv_heads=2)
    out = torch.empty_like(q)
    args = (q, case.arena, 1, case.tables, slots, lengths, 128**-0.5, out, workspace)
    decode_attention_triton(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention_triton(*args)
    for now in (seq_lens, short):
        lengths.copy_(now)
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, decode_attention_triton(*args))
