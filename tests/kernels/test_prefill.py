"""Stock prefill kernels read the arena's strided page view."""

from types import SimpleNamespace

import pytest
import torch

from sglang_kvc.kernels.layout import PAGE_SIZE
from tests.kernels import oracles

HEADS, GROUP, DIM, LAYERS = 2, 4, 128, 3
# (prefix, new) of each request: no prefix, page-aligned, one new token.
CASES = [(0, 100), (64, 37), (160, 1), (0, 16)]


def make_batch(device: str, dtype: torch.dtype):
    """A pool, its request table, a ForwardBatch look-alike, and queries."""
    from sglang_kvc.kv_pool import ArenaKVPool

    torch.manual_seed(0)
    pool = ArenaKVPool(
        64 * PAGE_SIZE,
        dtype=dtype,
        num_kv_heads=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device=device,
    )
    pool.arena.k.normal_()
    pool.arena.v.normal_()
    table = torch.zeros(8, 512, dtype=torch.int32, device=device)
    pages = torch.randperm(64, device=device) + 1
    start = 0
    for slot, (prefix, new) in enumerate(CASES, start=1):
        count = -(-(prefix + new) // PAGE_SIZE)
        own = pages[start : start + count, None] * PAGE_SIZE
        tokens = (own + torch.arange(PAGE_SIZE, device=device)).flatten()
        table[slot, : prefix + new] = tokens[: prefix + new].int()
        start += count
    lens = torch.tensor([p + n for p, n in CASES])
    new = torch.tensor([n for _, n in CASES])
    batch = SimpleNamespace(
        req_pool_indices=torch.arange(1, len(CASES) + 1, device=device),
        seq_lens=lens.to(device),
        seq_lens_cpu=lens,
        extend_seq_lens=new.to(device),
        extend_seq_lens_cpu=new.tolist(),
    )
    q = torch.randn(int(new.sum()), HEADS * GROUP, DIM, device=device, dtype=dtype)
    layer = SimpleNamespace(
        layer_id=2,
        scaling=DIM**-0.5,
        tp_q_head_num=HEADS * GROUP,
        tp_k_head_num=HEADS,
        head_dim=DIM,
    )
    return pool, table, batch, q, layer


def dense(pool, table, q, layer, dtype: torch.dtype) -> torch.Tensor:
    """Causal softmax attention, request by request, in `dtype`."""
    out, start = [], 0
    k_view, v_view = (view.to(dtype) for view in pool.get_kv_buffer(layer.layer_id))
    for slot, (prefix, new) in enumerate(CASES, start=1):
        tokens = table[slot, : prefix + new].long()
        k, v = (c[tokens // 16, tokens % 16] for c in (k_view, v_view))
        k, v = (c.repeat_interleave(GROUP, 1).transpose(0, 1) for c in (k, v))
        query = q[start : start + new].to(dtype).transpose(0, 1)
        s = query @ k.transpose(1, 2) * layer.scaling
        hidden = torch.ones(new, prefix + new, device=q.device).triu(prefix + 1).bool()
        p = s.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append((p @ v).transpose(0, 1))
        start += new
    return torch.cat(out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["FlashAttention3Prefill", "FlashInferPrefill"])
def test_gpu_backends_read_the_arena_view(name: str) -> None:
    """Within twice the error of the same maths in torch at bf16."""
    from sglang_kvc import prefill

    pool, table, batch, q, layer = make_batch("cuda", torch.bfloat16)
    backend = getattr(prefill, name)(pool, table)
    backend.plan(batch)
    out = backend.run(q, layer)
    truth = dense(pool, table, q, layer, torch.float64)
    working = dense(pool, table, q, layer, torch.bfloat16)
    oracles.assert_arith(out, working, truth)
