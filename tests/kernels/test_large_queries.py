"""A periodic pass of queries with large biases chooses by the queries it remembers."""

import pytest
import torch

from sglang_kvc.kernels.decode_attention import NewTokens, decode_attention_ref
from sglang_kvc.kernels.observe import observe_scores_triton
from sglang_kvc.kernels.query_ring import decode_ref, encode_ref
from sglang_kvc.kernels.select import SelectionRule, select_entries_triton
from sglang_kvc.kernels.testing import Case, make_case, make_plan
from tests.kernels import oracles

LENGTH, FOLD, WINDOW, GROUP, DIM = 200, 96, 8, 3, 64
SCALE = DIM**-0.5
KEPT = 7
LARGE = slice(DIM - 4, DIM)
"""Dimensions that are large and much the same in all queries, and in all keys."""


def decoded(case: Case) -> torch.Tensor:
    """Decode the last w tokens, as a server does it; their queries [L, w, Hq, D]."""
    arena, device = case.arena, case.arena.k.device
    heads = arena.num_kv_heads
    slots = torch.tensor(case.slots, device=device)
    queries = torch.randn(arena.num_layers, WINDOW, heads * GROUP, DIM, device=device)
    queries *= 8
    # 8 bits have steps of 2 there.
    queries[..., LARGE] = 123.4 + torch.rand_like(queries[..., LARGE])
    for row in range(WINDOW):
        position = LENGTH - WINDOW + row
        cells = case.tables.req_to_token[slots, position].long()
        lens = torch.tensor([position + 1], device=device)
        for layer in range(arena.num_layers):
            k, v = (
                part[cells // 16, layer, :, cells % 16].clone() for part in arena[:2]
            )
            decode_attention_ref(
                arena,
                case.tables,
                queries[layer, row][None],
                slots,
                lens,
                layer=layer,
                sm_scale=SCALE,
                new_tokens=NewTokens(k, v, cells, case.query_ring),
            )
    return queries


@pytest.mark.interpreter
def test_a_periodic_pass_chooses_by_remembered_queries(device: str) -> None:
    """Logits are 2,200 and more; exact queries differ from remembered ones by tens.

    So a log-sum-exp of an exact query, or of a remembered one in fp16, would weigh
    queries by powers of 2.
    """
    case = make_case(
        [LENGTH],
        [FOLD],
        layers=2,
        group=GROUP,
        head_dim=DIM,
        packed_pages=[4],
        window=WINDOW,
        device=device,
    )
    keys = case.arena.k[..., LARGE]
    keys.masked_fill_(~keys.isnan(), 25.0)
    # Stored scores are of the size of what a pass adds.
    case.arena.score.clamp_(max=0.01)
    queries = decoded(case)
    remembered = case.queries[case.slots[0]]
    assert torch.equal(remembered, decode_ref(encode_ref(queries), torch.float32))
    shift = (queries - remembered)[..., LARGE].sum(-1) * 25 * SCALE * 1.44
    assert shift.abs().max() > 2

    plan = make_plan(case, [KEPT], protected=WINDOW)
    where = (case.arena, case.tables, plan)
    how = {"group": GROUP, "sm_scale": SCALE, "power": 2}
    scores = observe_scores_triton(*where, case.query_ring, **how)
    rule = SelectionRule(sinks=4)
    selected = select_entries_triton(case.tables, plan, scores, rule=rule)

    assert oracles.query_lse(case, SCALE).min() > 2200
    truth = oracles.observe(case, SCALE, power=2)
    fold_new = [LENGTH // 16 * 16]
    wanted = oracles.select(case, truth, fold_new, [KEPT], WINDOW, sinks=4)
    assert selected.block_offsets.tolist() == wanted.block_offsets
    assert selected.source_rows.tolist() == wanted.source_rows
