"""Stock prefill kernels read the arena: as pages, or as blocks when packed."""

from types import SimpleNamespace

import pytest
import torch

from sglang_kvc.kernels.kv_dtype import E4M3, gather_rows, kv_scales, narrow_ref
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.testing import make_case
from sglang_kvc.scheduling.step_plan import Fold
from tests.kernels import oracles

HEADS, GROUP, DIM, LAYERS = 2, 4, 128, 3
# (prefix, new) of each request: no prefix, page-aligned, one new token.
CASES = [(0, 100), (64, 37), (160, 1), (0, 16)]


SCALES = {2: (0.75, 0.3)}
"""Of the layer that is tested, where the cache is e4m3."""


def make_batch(device: str, dtype: torch.dtype, kv_dtype: torch.dtype | None = None):
    """A pool, its request table, a ForwardBatch look-alike, and queries."""
    from sglang_kvc.memory.kv_pool import ArenaKVPool, KVScales

    torch.manual_seed(0)
    pool = ArenaKVPool(
        64 * PAGE_SIZE,
        dtype=kv_dtype or dtype,
        num_kv_heads=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device=device,
    )
    for cells in pool.arena[:2]:
        cells.copy_(torch.randn(cells.shape, device=device))
    pool.set_scales({layer: KVScales(*pair) for layer, pair in SCALES.items()})
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
    views, scales = pool.get_kv_buffer(layer.layer_id), pool.scales_of(layer.layer_id)
    k_view, v_view = (
        view.to(dtype) * scale for view, scale in zip(views, scales, strict=True)
    )
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
    from sglang_kvc.attention import prefill

    pool, table, batch, q, layer = make_batch("cuda", torch.bfloat16)
    kernel = getattr(prefill, name)(pool, table)
    out = kernel.run(kernel.plan(batch, []), q, layer)
    truth = dense(pool, table, q, layer, torch.float64)
    working = dense(pool, table, q, layer, torch.bfloat16)
    oracles.assert_arith(out, working, truth)


def test_torch_reads_an_e4m3_cache() -> None:
    from sglang_kvc.attention.prefill_torch import TorchPrefill, WholePrompts

    pool, table, batch, q, layer = make_batch("cpu", torch.float32, E4M3)
    kernel = TorchPrefill(WholePrompts(pool, table))
    out = kernel.run(kernel.plan(batch, []), q, layer)
    torch.testing.assert_close(out, dense(pool, table, q, layer, torch.float32))


@pytest.mark.gpu
def test_flashinfer_reads_an_e4m3_cache() -> None:
    """It converts K and V to bf16: errors as beside a bf16 cache."""
    from sglang_kvc.attention.prefill import FlashInferPrefill

    pool, table, batch, q, layer = make_batch("cuda", torch.bfloat16, E4M3)
    kernel = FlashInferPrefill(pool, table)
    out = kernel.run(kernel.plan(batch, []), q, layer)
    truth = dense(pool, table, q, layer, torch.float64)
    working = dense(pool, table, q, layer, torch.bfloat16)
    oracles.assert_arith(out, working, truth)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest values of e4m3, in fp64."""
    return narrow_ref(x, None, E4M3).double()


def close_as_e4m3(out: torch.Tensor, truth: torch.Tensor) -> None:
    """FA3 rounds the weights of the values to e4m3, too, by up to 1/16 each."""
    assert out.dtype == torch.bfloat16
    error = (out.double() - truth).norm() / truth.norm()
    assert error < 1 / 16, error


@pytest.mark.gpu
def test_fa3_multiplies_an_e4m3_cache_by_rounded_queries() -> None:
    from sglang_kvc.attention.prefill import FlashAttention3Prefill

    pool, table, batch, q, layer = make_batch("cuda", torch.bfloat16, E4M3)
    kernel = FlashAttention3Prefill(pool, table)
    out = kernel.run(kernel.plan(batch, []), q, layer)
    close_as_e4m3(out, dense(pool, table, rounded(q), layer, torch.float64))


# Compressed chunks: (sequence length, fold, new tokens) of each request.
PACKED = [(97, 96, 1), (150, 64, 80), (400, 320, 64), (50, 0, 50)]


def make_packed(device: str, dtype: torch.dtype, kv_dtype: torch.dtype | None = None):
    """A case with skewed heads as a pool, its batch look-alike, and queries."""
    lens, folds, new = (list(column) for column in zip(*PACKED, strict=True))
    case = make_case(
        lens,
        folds,
        layers=LAYERS,
        kv_heads=HEADS,
        group=GROUP,
        head_dim=DIM,
        dtype=kv_dtype or dtype,
        query_dtype=dtype,
        device=device,
    )
    # Unowned cells hold NaN; FA3 loads whole pages and masks by length.
    for cells in (case.arena.k, case.arena.v):
        cells.copy_(cells.float().nan_to_num(0.0))
    budgets = [PAGE_SIZE * pages for pages in case.packed_pages]
    pool = SimpleNamespace(arena=case.arena, start_layer=0, device=device)
    batch = SimpleNamespace(
        req_pool_indices=torch.tensor(case.slots, device=device),
        seq_lens=torch.tensor(lens, device=device),
        seq_lens_cpu=torch.tensor(lens),
        extend_seq_lens=torch.tensor(new, device=device),
        extend_seq_lens_cpu=new,
    )
    q = torch.randn(sum(new), HEADS * GROUP, DIM, device=device, dtype=dtype)
    layer = SimpleNamespace(layer_id=2, scaling=DIM**-0.5)
    return case, pool, batch, list(map(Fold, folds, budgets)), q, layer


def packed_dense(case, q, layer, dtype: torch.dtype) -> torch.Tensor:
    """Attention over the entries of each head, one by one, in `dtype`."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    scales = kv_scales(case.arena, layer.layer_id)
    cells = list(zip(case.arena[:2], scales, strict=True))
    start = 0
    for r, (length, _, new) in enumerate(PACKED):
        for h in range(HEADS):
            entries = oracles.entries(case, r, layer.layer_id * HEADS + h)
            rows = torch.tensor([row for row, _ in entries], device=q.device)
            k_pos = torch.tensor([pos for _, pos in entries], device=q.device)
            q_pos = torch.arange(length - new, length, device=q.device)
            k, v = (gather_rows(part, rows, scale, dtype) for part, scale in cells)
            group = slice(h * GROUP, (h + 1) * GROUP)
            query = q[start : start + new, group].to(dtype).transpose(0, 1)
            s = query @ k.T * layer.scaling
            s = s.masked_fill(k_pos > q_pos[:, None], float("-inf"))
            out[start : start + new, group] = (s.softmax(-1) @ v).transpose(0, 1)
        start += new
    return out


@pytest.mark.parametrize("kv_dtype", [torch.float32, E4M3])
def test_torch_attends_to_packed_blocks_and_the_causal_tail(
    kv_dtype: torch.dtype,
) -> None:
    from sglang_kvc.attention.prefill_torch import PackedPrompts, TorchPrefill

    case, pool, batch, folds, q, layer = make_packed("cpu", torch.float32, kv_dtype)
    kernel = TorchPrefill(PackedPrompts(pool, case.tables))
    out = kernel.run(kernel.plan(batch, folds), q, layer)
    torch.testing.assert_close(out, packed_dense(case, q, layer, torch.float32))


@pytest.mark.parametrize("kv_dtype", [torch.float32, E4M3])
def test_page_lists_name_packed_blocks_and_the_causal_tail(
    kv_dtype: torch.dtype,
) -> None:
    """The plan, with the reference in the kernel's place: `test_ops` compares them."""
    from sglang_kvc.attention.prefill_packed import TritonPackedPrefill

    case, pool, batch, folds, q, layer = make_packed("cpu", torch.float32, kv_dtype)
    kernel = TritonPackedPrefill(pool, case.tables)
    out = kernel.run(kernel.plan(batch, folds), q, layer)
    torch.testing.assert_close(out, packed_dense(case, q, layer, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, E4M3])
def test_our_kernel_attends_to_packed_blocks_and_the_causal_tail(
    kv_dtype: torch.dtype,
) -> None:
    """Within twice the error of the same maths in torch at bf16."""
    from sglang_kvc.attention.prefill_packed import TritonPackedPrefill

    case, pool, batch, folds, q, layer = make_packed("cuda", torch.bfloat16, kv_dtype)
    kernel = TritonPackedPrefill(pool, case.tables)
    out = kernel.run(kernel.plan(batch, folds), q, layer)
    truth = packed_dense(case, q, layer, torch.float64)
    working = packed_dense(case, q, layer, torch.bfloat16)
    oracles.assert_arith(out, working, truth)


@pytest.mark.gpu
def test_fa3_attends_to_packed_blocks_and_the_causal_tail() -> None:
    """Within twice the error of the same maths in torch at bf16."""
    pytest.importorskip("sglang", reason="needs SGLang's FlashAttention-3")
    from sglang_kvc.attention.prefill_packed import FlashAttention3PackedPrefill

    case, pool, batch, folds, q, layer = make_packed("cuda", torch.bfloat16)
    kernel = FlashAttention3PackedPrefill(pool, case.tables)
    out = kernel.run(kernel.plan(batch, folds), q, layer)
    truth = packed_dense(case, q, layer, torch.float64)
    working = packed_dense(case, q, layer, torch.bfloat16)
    oracles.assert_arith(out, working, truth)


@pytest.mark.gpu
def test_fa3_attends_to_packed_blocks_in_e4m3() -> None:
    pytest.importorskip("sglang", reason="needs SGLang's FlashAttention-3")
    from sglang_kvc.attention.prefill_packed import FlashAttention3PackedPrefill

    case, pool, batch, folds, q, layer = make_packed("cuda", torch.bfloat16, E4M3)
    kernel = FlashAttention3PackedPrefill(pool, case.tables)
    out = kernel.run(kernel.plan(batch, folds), q, layer)
    close_as_e4m3(out, packed_dense(case, rounded(q), layer, torch.float64))


def test_no_head_has_more_blocks_than_the_table_has_columns() -> None:
    from sglang_kvc.attention.prefill_packed import table_width

    assert table_width([50], [Fold(0, 0)], 64) == 4
    # 1,040 folded tokens are 65 blocks; 4 pages of 64 heads are more.
    assert table_width([1050], [Fold(1040, 64)], 64) == 65 + 1
    # One page of 4 heads is 4 blocks, whoever wins them.
    assert table_width([1050, 20], [Fold(1040, 16), Fold(0, 0)], 4) == 4 + 1
