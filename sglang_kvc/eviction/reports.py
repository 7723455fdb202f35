"""What a request is told of its passes: ``report_heads`` and ``report_tokens``.

Runs behind a pass, on its stream, for the requests that ask; nothing waits. For
``report_tokens`` the positions of packed KVs are kept beside the pool, 4 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_kvc.kernels.held import follow_positions, page_ordinals
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.upstream.ranks import gather_heads

if TYPE_CHECKING:
    from sglang_kvc.kernels.layout import Arena
    from sglang_kvc.kernels.select import SelectedEntries
    from sglang_kvc.memory.device_state import DeviceState
    from sglang_kvc.scheduling.request_state import PassInFlight


@dataclass(frozen=True)
class KeptPositions:
    """Where the packed KVs of a request stand in its text, on the device.

    Attributes
    ----------
    pages : [P] int64, the pages that hold them.
    positions : [P * 16 * L * H] int32, in packed order.
    """

    pages: torch.Tensor
    positions: torch.Tensor


def report(
    state: DeviceState, group: list[PassInFlight], selected: SelectedEntries
) -> None:
    """Fill ``head_blocks`` and ``token_shares`` of the passes of a launch, if asked.

    All ranks come here for the same passes in the same order.

    Parameters
    ----------
    state : of this rank.
    group : passes of one launch, in the order of its plan.
    selected : their survivors, on the device.
    """
    heads, first = state.arena.heads_per_page, 0
    for launched, offsets in zip(group, selected.block_offsets, strict=True):
        asked = launched.state.policy.request
        last = first + launched.decision.packed_new * heads
        if asked.report_heads:
            blocks = offsets.diff().view(state.shape.num_layers, -1)
            launched.head_blocks = _to_host(state, gather_heads(blocks))
        if asked.report_tokens:
            rows = selected.source_rows[first:last]
            launched.token_shares = _to_host(
                state, _token_shares(state, launched, rows)
            )
        first = last


def warm_up_positions(rows: torch.Tensor, arena: Arena) -> None:
    """Compile what follows positions; `rows` are survivors of the padding page."""
    ordinals = page_ordinals(torch.zeros_like(rows[:1]).long(), arena.k.shape[0])
    folds = {"fold_old": 0, "fold_new": PAGE_SIZE, "tokens": 1}
    heads = arena.heads_per_page
    follow_positions(rows, ordinals, rows[:0], **folds, heads_per_page=heads)


def _to_host(state: DeviceState, values: torch.Tensor) -> torch.Tensor:
    """Copy to the host; it is there when the step is done.

    The step's result, which is waited for, comes behind this copy.
    """
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=state.on_gpu)
    return host.copy_(values, non_blocking=True)


def _token_shares(
    state: DeviceState, launched: PassInFlight, rows: torch.Tensor
) -> torch.Tensor:
    """[prompt] int16: of each token the heads that hold it, in thousandths of all.

    `rows` are the survivors' arena rows. The request's positions move past the pass.
    """
    decision, request, arena = launched.decision, launched.state, state.arena
    # A pass does not change this row: what was the tail before it can still be read.
    tokens = state.tables.req_to_token[decision.slot]
    tail = tokens[decision.fold_old : decision.fold_new : PAGE_SIZE]
    pages, known = tail.long() // PAGE_SIZE, rows[:0]
    before: KeptPositions | None = request.positions
    if before is not None:
        pages, known = torch.cat([before.pages, pages]), before.positions
    held = follow_positions(
        rows,
        page_ordinals(pages, arena.k.shape[0]),
        known,
        fold_old=decision.fold_old,
        fold_new=decision.fold_new,
        tokens=len(launched.req.origin_input_ids),
        heads_per_page=arena.heads_per_page,
    )
    dest_pages = launched.dest_tokens[::PAGE_SIZE] // PAGE_SIZE
    request.positions = KeptPositions(dest_pages, held.positions)
    by_rank = gather_heads(held.holders[:, None])
    heads = by_rank.shape[1] * arena.heads_per_page
    return ((by_rank.sum(1) * 1000 + heads // 2) // heads).to(torch.int16)
