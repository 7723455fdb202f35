"""Slow second implementations, written from the documents alone, and error criteria.

They share no code with `sglang_kvc.kernels`: addresses are followed entry by entry in
Python loops, arithmetic is in float64.
"""

import math
from typing import NamedTuple

import torch

from sglang_kvc.kernels.testing import Case

S = 16


def entries(case: Case, r: int, lh: int, end: int | None = None) -> list[tuple]:
    """(arena row, position) of every entry of head lh of request r, in order.

    Packed entries have position -1. `end` cuts the tail; the sequence length if None.
    """
    heads, slot = case.arena.heads_per_page, case.slots[r]
    offsets = case.tables.block_offsets[slot].tolist()
    pages = case.tables.packed_pages[slot].tolist()
    tokens = case.tables.req_to_token[slot].tolist()
    found = []
    for block in range(offsets[lh], offsets[lh + 1]):
        page, in_page = pages[block // heads], block % heads
        found += [((page * heads + in_page) * S + i, -1) for i in range(S)]
    for position in range(case.folds[r], case.seq_lens[r] if end is None else end):
        page, offset = divmod(tokens[position], S)
        found.append(((page * heads + lh) * S + offset, position))
    return found


def decode_loop(
    query: list[float], keys: list[list], values: list[list], scale: float
) -> list[float]:
    """softmax(scale q K^T) V of one query in plain Python floats."""
    logits = [scale * sum(a * b for a, b in zip(query, k, strict=True)) for k in keys]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return [
        sum(w * v[d] for w, v in zip(weights, values, strict=True)) / total
        for d in range(len(query))
    ]


def decode(case: Case, q: torch.Tensor, layer: int, scale: float) -> torch.Tensor:
    """Decode attention of request r's query q[r], float64, one head at a time."""
    heads, group = case.arena.num_kv_heads, case.group
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    cells = [c.view(-1, case.arena.head_dim) for c in (case.arena.k, case.arena.v)]
    for r in range(len(case.slots)):
        for h in range(heads):
            rows = [row for row, _ in entries(case, r, layer * heads + h)]
            k, v = (c[rows].double() for c in cells)
            g = slice(h * group, (h + 1) * group)
            out[r, g] = (q[r, g].double() @ k.T * scale).softmax(-1) @ v
    return out


def observe(
    case: Case,
    scale: float,
    power: int,
    query_start: int = 0,
    logits_in: torch.dtype = torch.float64,
    value_norms: bool = False,
) -> torch.Tensor:
    """Workspace of `observe_scores` when every query_start is the same, float64.

    The logits are computed in `logits_in`: the model's dtype gives the error that torch
    makes on the same problem.
    """
    arena, ring = case.arena, case.queries
    window, group = ring.shape[2], case.group
    keys, stored = arena.k.view(-1, arena.head_dim), arena.score.view(-1)
    values = arena.v.view(-1, arena.head_dim)
    parts = []
    for r, slot in enumerate(case.slots):
        seq_len, fold = case.seq_lens[r], case.folds[r]
        observed = range(max(query_start, seq_len - window, 0), seq_len)
        size = -(-(seq_len - fold) // S) * S - (seq_len - fold)
        for lh in range(arena.heads_per_page):
            layer, h = divmod(lh, arena.num_kv_heads)
            found = entries(case, r, lh)
            rows = [row for row, _ in found]
            at = torch.tensor([p for _, p in found], device=ring.device)
            total = torch.zeros(len(rows), dtype=torch.float64, device=ring.device)
            for p in observed:
                q = ring[slot, layer, p % window, h * group : (h + 1) * group]
                logits = q.to(logits_in) @ keys[rows].to(logits_in).T
                logits = logits.double() * scale
                logits[:, at > p] = -math.inf
                if (at <= p).any():
                    total += (logits.softmax(-1) ** power).sum(0)
            if value_norms:
                total *= (values[rows].double() ** 2).sum(1).sqrt()
            if fold:
                total += stored[rows].double()
            parts += [total, total.new_zeros(size)]
    return torch.cat(parts)


def query_lse(case: Case, scale: float, query_start: int = 0) -> torch.Tensor:
    """log2-sum-exp2 of every observed query, [R, L * H, w * G] float64.

    inf where a row of the ring is not observed, or sees nothing.
    """
    arena, ring = case.arena, case.queries
    window, group = ring.shape[2], case.group
    keys = arena.k.view(-1, arena.head_dim)
    size = (len(case.slots), arena.heads_per_page, window, group)
    found = torch.full(size, math.inf, dtype=torch.float64)
    for r, slot in enumerate(case.slots):
        observed = range(
            max(query_start, case.seq_lens[r] - window, 0), case.seq_lens[r]
        )
        for lh in range(arena.heads_per_page):
            layer, h = divmod(lh, arena.num_kv_heads)
            group_heads = slice(h * group, (h + 1) * group)
            held = entries(case, r, lh)
            for p in observed:
                rows = [row for row, at in held if at <= p]
                q = ring[slot, layer, p % window, group_heads].double()
                if rows:
                    logits = q @ keys[rows].double().T * scale
                    lse = logits.logsumexp(-1) / math.log(2)
                    found[r, lh, p % window] = lse.cpu()
    return found.flatten(2).to(ring.device)


class Survivors(NamedTuple):
    """`SelectedEntries` as lists: of all requests, but offsets of each."""

    source_rows: list[int]
    scores: list[float]
    block_offsets: list[list[int]]


def select(
    case: Case,
    scores: torch.Tensor,
    fold_new: list[int],
    keep_pages: list[int],
    protected: int,
    sinks: int,
    groups: int = 1,
    floor_blocks: int = 0,
    bounds: tuple[int, list[int]] | None = None,
) -> Survivors:
    """Literal Algorithm 1, with lists and sorts.

    It runs once for each group of heads. `bounds`: so many other groups, and the most
    blocks that they may lose together, by request, in equal parts.
    """
    heads = case.arena.heads_per_page
    values = scores.tolist()
    start = 0
    found = Survivors([], [], [])
    for r in range(len(case.slots)):
        held, prices, total = [], [], 0
        for lh in range(heads):
            rows = [row for row, _ in entries(case, r, lh, fold_new[r])]
            n = len(rows)
            own = values[start : start + n]
            ranked = sorted(
                (math.inf if i < sinks or i >= n - protected else score, i)
                for i, score in enumerate(own)
            )
            blocks = range(n // S - floor_blocks)
            prices.append([(ranked[S * k + S - 1][0], lh, k) for k in blocks])
            total += n // S
            held.append((rows, own, ranked))
            tail = -(-(case.seq_lens[r] - case.folds[r]) // S) * S
            start += n - (fold_new[r] - case.folds[r]) + tail
        if bounds:
            parts, most = bounds
            size = heads // parts
            for g in range(0, heads, size):
                open_to_all = sorted(sum(prices[g : g + size], []))[: most[r] // parts]
                for lh in range(g, g + size):
                    prices[lh] = [block for block in open_to_all if block[1] == lh]
        evict = (total - keep_pages[r] * heads) // groups
        gone: list[int] = []
        for g in range(groups):
            of_group = prices[g * heads // groups : (g + 1) * heads // groups]
            gone += [lh for _, lh, _ in sorted(sum(of_group, []))[:evict]]
        offsets = [0]
        for lh, (rows, own, ranked) in enumerate(held):
            lost = {i for _, i in ranked[: S * gone.count(lh)]}
            kept = [i for i in range(len(rows)) if i not in lost]
            found.source_rows.extend(rows[i] for i in kept)
            found.scores.extend(own[i] for i in kept)
            offsets.append(offsets[-1] + len(kept) // S)
        found.block_offsets.append(offsets)
    return found


def assert_arith(
    actual: torch.Tensor, working: torch.Tensor, truth: torch.Tensor
) -> None:
    """At most twice the error of `working`, torch at the same dtype, plus rounding.

    The rounding floor is two units in the last place of the largest true value in
    `working`'s dtype: the largest of thousands of errors differs by as much from one
    machine's matrix products to another's.
    """
    assert actual.isfinite().all()
    error = (actual.double() - truth).abs().max().item()
    torch_error = (working.double() - truth).abs().max().item()
    floor = 2 * torch.finfo(working.dtype).eps * truth.abs().max().item()
    assert error <= 2 * torch_error + floor, (error, torch_error, floor)
