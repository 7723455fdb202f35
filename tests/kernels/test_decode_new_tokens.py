"""`decode_attention` with `NewTokens`: it stores what `append_kv` would, bit by bit."""

import pytest
import torch

from sglang_kvc.kernels.append import append_kv
from sglang_kvc.kernels.decode_attention import (
    DecodeConfig,
    NewTokens,
    decode_attention,
    decode_attention_triton,
    plan_decode_triton,
)
from sglang_kvc.kernels.query_ring import decode_ref, encode_ref
from sglang_kvc.kernels.testing import make_case
from tests.kernels.decode_checks import (
    check_new_tokens,
    make_batch,
    make_new_tokens,
    make_workspace,
)
from tests.kernels.decode_checks import one_sm as one_sm


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
        (7, 96, torch.float16, {"row_slack": None, "max_parts": None}),
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
        seq_lens, folds, layers=2, group=group, head_dim=dim, dtype=dtype, device=device
    )
    config = DecodeConfig(16, programs_per_sm=programs, **switches)
    check_new_tokens(case, layer=1, padding=padding, config=config)


@pytest.mark.interpreter
@pytest.mark.usefixtures("one_sm")
def test_new_token_of_a_head_without_others(device: str) -> None:
    """Head 0 kept nothing, and the tail begins with the newest token."""
    case = make_case(
        [33, 65],
        [32, 64],
        layers=1,
        group=2,
        head_dim=64,
        packed_pages=[2, 3],
        device=device,
    )
    case.tables.block_offsets[case.slots, 1] = 0
    check_new_tokens(case, config=DecodeConfig(16, programs_per_sm=4))


def test_reference_stores_new_tokens() -> None:
    case = make_case(
        [52, 19], [32, 0], layers=2, group=2, head_dim=16, dtype=torch.bfloat16
    )
    q, slots, seq_lens = make_batch(case, padding=1)
    new = make_new_tokens(case, slots)
    args = (case.arena, case.tables, q, slots, seq_lens)
    how = {"layer": 1, "sm_scale": 0.25}
    out = decode_attention(*args, **how, new_tokens=new)
    for b, (slot, last) in enumerate(zip(case.slots, (51, 18), strict=True)):
        page, offset = divmod(int(new.out_cache_loc[b]), 16)
        assert torch.equal(case.arena.k[page, 1, :, offset], new.k[b])
        assert torch.equal(case.arena.v[page, 1, :, offset], new.v[b])
        assert not case.arena.score[page, 1, :, offset].any()
        found = case.queries[slot, 1, last % 8]
        assert torch.equal(found, decode_ref(encode_ref(q[b]), torch.bfloat16))
    assert torch.equal(out, decode_attention(*args, **how))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 49, 900])
def test_gpu_graph_of_layers_with_new_tokens(tokens: int, device: str) -> None:
    """Replays, each with K, V of its own a layer, store what append stores, bit by bit.

    They attend to it: each replay has other K and V, and its output is that of a decode
    behind the append but for rounding. A token alone is all of its own output.
    """
    layers, batch = 6, 16
    shape = {"dtype": torch.bfloat16, "device": device}
    case = make_case(
        [tokens] * batch, layers=layers, kv_heads=8, group=4, head_dim=128, **shape
    )
    q, slots, seq_lens = make_batch(case, padding=3)
    cells = make_new_tokens(case, slots).out_cache_loc
    ring_index = slots * 8 + (seq_lens.long() - 1) % 8
    workspace = make_workspace(case, len(slots))
    kvs = [torch.randn(layers, len(slots), 8, 128, **shape) for _ in range(2)]
    outs = [torch.empty_like(q) for _ in range(layers)]

    def step(fused: bool) -> None:
        how = {"num_kv_heads": 8, "query_ring": case.query_ring}
        plan_decode_triton(case.tables, slots, seq_lens, workspace, **how)
        for layer, out in enumerate(outs):
            k, v = (part[layer] for part in kvs)
            new = NewTokens(k, v, cells, case.query_ring) if fused else None
            if not fused:
                into = (cells, case.query_ring, ring_index)
                append_kv(case.arena, k, v, q, *into, layer=layer)
            decode_attention_triton(
                case.arena,
                case.tables,
                q,
                slots,
                seq_lens,
                layer=layer,
                sm_scale=0.1,
                out=out,
                workspace=workspace,
                new_tokens=new,
            )

    step(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(True)
    for _ in range(20):
        for part in (*kvs, q):
            part.normal_()
        graph.replay()
        outputs = [out[:batch].clone() for out in outs]
        written = [
            part[1:].clone() for part in (*case.arena.cells, *case.query_ring[:2])
        ]
        step(False)
        for ours, theirs in zip(outputs, outs, strict=True):
            torch.testing.assert_close(ours, theirs[:batch], atol=8e-3, rtol=1.6e-2)
        for ours, theirs in zip(
            written, (*case.arena.cells, *case.query_ring[:2]), strict=True
        ):
            assert torch.equal(ours.nan_to_num(7.0), theirs[1:].nan_to_num(7.0))
    assert not workspace.arrivals.any()
