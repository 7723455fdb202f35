"""Every op in one table: its two forms, and calls that they are compared on.

Tests, the compile check and benches walk it; nothing that serves imports it. It leaves
out `plan_decode`, whose forms give the plan in different shapes, and
`full_attention_scores`, which has one form.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sglang_kvc.kernels import (
    append,
    decode_attention,
    head_tables,
    held,
    key_diff,
    novelty,
    observe,
    pack,
    packed_prefill,
    pool,
    positional,
    select,
)
from sglang_kvc.kernels.layout import PAGE_SIZE, PassPlan
from sglang_kvc.kernels.testing import Case, make_plan


class Call(NamedTuple):
    """Arguments of one call of an op; it may write to them."""

    args: tuple[Any, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Op:
    """An op of this folder.

    Attributes
    ----------
    run : what others call; it picks a form.
    kernel, reference : the forms, of equal signature.
    make_calls : calls on a case that reach every kernel of the op.
    tolerance : how far results of the forms may be apart, relative to the largest one;
        0 where they move or choose: then they are bit-equal.
    """

    run: Callable[..., Any]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    make_calls: Callable[[Case], Iterator[Call]]
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """What the op is called."""
        return self.run.__name__

    @property
    def module(self) -> ModuleType:
        """Where the wrapper looks up `use_triton`."""
        return sys.modules[self.run.__module__]


def outcome(form: Callable[..., Any], call: Call) -> list[torch.Tensor]:
    """What a form returns and leaves in its arguments; it gets copies of them."""
    args, settings = _copied(call.args), _copied(call.settings)
    result = form(*args, **settings)
    return [*_tensors(result), *_tensors(args), *_tensors(settings)]


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = map(_copied, value)
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """slots and seq_lens."""
    device = case.arena.k.device
    slots, lens = (torch.tensor(x, device=device) for x in (case.slots, case.seq_lens))
    return slots, lens


def _queries(case: Case) -> torch.Tensor:
    """Slots are different, so these are: one row of each request's ring."""
    return case.queries[case.slots, -1, 0].to(case.query_dtype)


def _new_tokens(case: Case) -> decode_attention.NewTokens:
    """K and V at the newest position of every request."""
    slots, lens = _batch(case)
    where = case.tables.req_to_token[slots, lens - 1].long()
    heads = case.arena.num_kv_heads
    k, v = _queries(case)[:, :heads], _queries(case)[:, -heads:]
    return decode_attention.NewTokens(k, v, where, case.query_ring)


def _append(case: Case) -> Iterator[Call]:
    slots, lens = _batch(case)
    k, v, where, ring = _new_tokens(case)
    rows = slots * ring.window + (lens - 1) % ring.window
    args = (case.arena, k, v, _queries(case), where, ring, rows)
    yield Call(args, {"layer": case.arena.num_layers - 1})


def _decode(case: Case) -> Iterator[Call]:
    how = {"layer": case.arena.num_layers - 1, "sm_scale": case.arena.head_dim**-0.5}
    args = (case.arena, case.tables, _queries(case), *_batch(case))
    yield Call(args, how)
    yield Call(args, {**how, "new_tokens": _new_tokens(case)})


def _head_tables(case: Case) -> Iterator[Call]:
    width = max(case.seq_lens) // PAGE_SIZE + 1
    how = {"num_kv_heads": case.arena.num_kv_heads, "width": width}
    yield Call((case.tables, *_batch(case)), how)


def _packed_prefill(case: Case) -> Iterator[Call]:
    slots, lens = _batch(case)
    arena = case.arena
    for (tables, *batch), how in _head_tables(case):
        blocks, head_lens = head_tables.head_tables_ref(tables, *batch, **how)
        # The tail ends with the new tokens; a new prompt is one whole.
        folds = torch.tensor(case.folds, device=slots.device)
        new = (lens - folds).clamp(max=100)
        cu_new = torch.nn.functional.pad(new.cumsum(0, dtype=torch.int32), (1, 0))
        generator = torch.Generator(slots.device).manual_seed(0)
        shape = (int(cu_new[-1]), case.group * arena.num_kv_heads, arena.head_dim)
        q = torch.randn(shape, generator=generator, device=slots.device)
        layer = arena.num_layers - 1
        args = (arena, q.to(case.query_dtype), blocks[layer], head_lens[layer], cu_new)
        sizes = {"layer": layer, "longest_new": int(new.max())}
        yield Call(args, {"sm_scale": arena.head_dim**-0.5, **sizes})


def _observe(case: Case) -> Iterator[Call]:
    args = (case.arena, case.tables, make_plan(case), case.query_ring)
    scale = case.arena.head_dim**-0.5
    how = {"group": case.group, "sm_scale": scale, "power": 2}
    for value_norms in (False, True):
        yield Call(args, {**how, "value_norms": value_norms})


def _score(case: Case) -> Iterator[Call]:
    yield Call((case.arena, case.tables, make_plan(case)), {})


def _random(case: Case) -> Iterator[Call]:
    yield Call((case.arena, case.tables, make_plan(case)), {"seed": 7})


def _scored(case: Case) -> tuple[PassPlan, torch.Tensor]:
    """A plan, and scores that differ; padding is 0."""
    plan = make_plan(case, spare=0.5)
    where = (case.arena, case.tables, plan)
    return plan, positional.random_scores_ref(*where, seed=1) ** 8


def _pool(case: Case) -> Iterator[Call]:
    pooling = pool.Pooling(back=64, ahead=3, decay=0.95, gain=0.03)
    yield Call((case.tables, *_scored(case)), {"pooling": pooling})


def _novelty(case: Case) -> Iterator[Call]:
    plan, scores = _scored(case)
    diffs = key_diff.key_diff_ref(case.arena, case.tables, plan)
    novelty_unit = torch.rand(len(case.tables.fold_lens), device=scores.device)
    yield Call((case.tables, plan, scores, diffs, novelty_unit), {"weight": 0.5})


def _select(case: Case) -> Iterator[Call]:
    plan, scores = _scored(case)
    layers = case.arena.num_layers
    # Layers of packed requests may hold less than what all shall lose alike.
    shared = ((1, 0),) if any(case.folds) else ((1, 0), (layers, 0), (1, layers))
    for groups, bound_groups in shared:
        rule = select.SelectionRule(sinks=4, groups=groups, bound_groups=bound_groups)
        yield Call((case.tables, plan, scores), {"rule": rule})


def _pack(case: Case) -> Iterator[Call]:
    plan, scores = _scored(case)
    rule = select.SelectionRule(sinks=4)
    selected = select.select_entries_ref(case.tables, plan, scores, rule=rule)
    count = plan.num_kept // (PAGE_SIZE * case.arena.heads_per_page)
    pages = torch.tensor(case.free_pages[:count], device=scores.device)
    yield Call((case.arena, plan, selected, pages), {})


def _commit(case: Case) -> Iterator[Call]:
    _, scores = _scored(case)
    for (arena, *rest), _ in _pack(case):
        yield Call((arena, case.tables, *rest, scores), {})


def _follow(case: Case) -> Iterator[Call]:
    tables, device = case.tables, case.arena.k.device
    for (_, plan, selected, _), _ in _pack(case):
        requests = []
        ends = [*(it.keep_base for it in plan.requests()), plan.num_kept][1:]
        for it, packed, end in zip(
            plan.requests(), case.packed_pages, ends, strict=True
        ):
            before = None
            if packed:
                own = tables.packed_pages[it.slot, :packed].long()
                size = packed * PAGE_SIZE * tables.heads_per_page
                known = torch.arange(size, dtype=torch.int32, device=device) % 50
                before = held.KeptPositions(own, known)
            folds, kept = (it.fold_old, it.fold_new), (it.keep_base, end - it.keep_base)
            for tokens in (40, it.seq_len):
                request = held.FollowedRequest(it.slot, *folds, tokens, *kept, before)
                requests.append(request)
        sizes = {"num_pages": len(case.arena.k)}
        # A table of its own for each, and one for all.
        for some in (requests[:1], requests):
            yield Call((tables, selected.source_rows, tuple(some)), sizes)


def _thousandths(case: Case) -> Iterator[Call]:
    device, heads = case.arena.k.device, case.arena.heads_per_page
    for ranks in (1, 3):
        size = (sum(case.seq_lens), ranks)
        by_rank = torch.randint(heads + 1, size, dtype=torch.int32, device=device)
        yield Call((by_rank,), {"heads": heads * ranks})


OPS = (
    Op(append.append_kv, append.append_kv_triton, append.append_kv_ref, _append),
    Op(
        decode_attention.decode_attention,
        decode_attention.decode_attention_triton,
        decode_attention.decode_attention_ref,
        _decode,
        tolerance=1e-4,
    ),
    Op(
        head_tables.head_tables,
        head_tables.head_tables_triton,
        head_tables.head_tables_ref,
        _head_tables,
    ),
    Op(
        packed_prefill.packed_prefill,
        packed_prefill.packed_prefill_triton,
        packed_prefill.packed_prefill_ref,
        _packed_prefill,
        tolerance=1e-4,
    ),
    Op(
        observe.observe_scores,
        observe.observe_scores_triton,
        observe.observe_scores_ref,
        _observe,
        tolerance=1e-4,
    ),
    Op(
        key_diff.key_diff,
        key_diff.key_diff_triton,
        key_diff.key_diff_ref,
        _score,
        tolerance=1e-5,
    ),
    Op(
        positional.recency_scores,
        positional.recency_scores_triton,
        positional.recency_scores_ref,
        _score,
    ),
    Op(
        positional.random_scores,
        positional.random_scores_triton,
        positional.random_scores_ref,
        _random,
    ),
    Op(pool.pool_scores, pool.pool_scores_triton, pool.pool_scores_ref, _pool),
    Op(
        novelty.add_novelty,
        novelty.add_novelty_triton,
        novelty.add_novelty_ref,
        _novelty,
        tolerance=1e-6,
    ),
    Op(
        select.select_entries,
        select.select_entries_triton,
        select.select_entries_ref,
        _select,
    ),
    Op(pack.pack_entries, pack.pack_entries_triton, pack.pack_entries_ref, _pack),
    Op(pack.commit_tables, pack.commit_tables_triton, pack.commit_tables_ref, _commit),
    Op(
        held.follow_positions,
        held.follow_positions_triton,
        held.follow_positions_ref,
        _follow,
    ),
    Op(held.thousandths, held.thousandths_triton, held.thousandths_ref, _thousandths),
)
