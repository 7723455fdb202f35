"""What a request is told of its passes: ``report_heads`` and ``report_tokens``.

Runs behind a pass, on its stream, for the requests that ask; nothing waits. For
``report_tokens`` the positions of packed KVs are kept beside the pool, 4 bytes each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_kvc.kernels.held import (
    FollowedRequest,
    KeptPositions,
    follow_positions,
    thousandths,
)
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.upstream.ranks import gather_heads

if TYPE_CHECKING:
    from sglang_kvc.kernels.select import SelectedEntries
    from sglang_kvc.memory.device_state import DeviceState
    from sglang_kvc.scheduling.request_state import PassInFlight


def report(
    state: DeviceState,
    group: list[PassInFlight],
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
) -> None:
    """Fill ``head_blocks`` and ``token_shares`` of the passes of a launch, if asked.

    All ranks come here for the same launches in the same order.

    Parameters
    ----------
    state : of this rank.
    group : passes of one launch, in the order of its plan.
    selected : their survivors, on the device.
    dest_pages : [pages kept] int64, where they went, in the same order.
    """
    asking: list[tuple[PassInFlight, int]] = []
    first_page = 0
    for row, launched in enumerate(group):
        asked = launched.state.policy.request
        if asked.report_heads:
            counts = selected.block_offsets[row].diff()
            blocks = counts.view(state.shape.num_layers, -1)
            launched.head_blocks = _to_host(state, gather_heads(blocks))
        if asked.report_tokens:
            asking.append((launched, first_page))
        first_page += launched.decision.packed_new // PAGE_SIZE
    if asking:
        _report_tokens(state, asking, selected, dest_pages)


def warm_up_positions(state: DeviceState, rows: torch.Tensor) -> None:
    """Compile what follows positions; `rows` are survivors of the padding page."""
    padding = FollowedRequest(
        slot=0, fold_old=0, fold_new=PAGE_SIZE, tokens=1, keep_base=0, kept=len(rows)
    )
    num_pages = len(state.arena.k)
    held = follow_positions(state.tables, rows, [padding], num_pages=num_pages)
    thousandths(held.holders[:, None], heads=state.arena.heads_per_page)


def _to_host(state: DeviceState, values: torch.Tensor) -> torch.Tensor:
    """Copy to the host; it is there when the step is done.

    The step's result, which is waited for, comes behind this copy.
    """
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=state.on_gpu)
    return host.copy_(values, non_blocking=True)


def _report_tokens(
    state: DeviceState,
    asking: list[tuple[PassInFlight, int]],
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
) -> None:
    """Fill ``token_shares`` of passes, and move their requests' positions past them.

    Each of `asking` comes with the first of its `dest_pages`. What is launched costs
    the host more than the device, so all of them share it.
    """
    arena = state.arena
    page_entries = PAGE_SIZE * arena.heads_per_page
    requests = [
        FollowedRequest(
            slot=launched.decision.slot,
            # A pass does not change the slot's row: what was its tail still stands.
            fold_old=launched.decision.fold_old,
            fold_new=launched.decision.fold_new,
            tokens=len(launched.req.origin_input_ids),
            keep_base=first_page * page_entries,
            kept=launched.decision.packed_new * arena.heads_per_page,
            before=launched.state.positions,
        )
        for launched, first_page in asking
    ]
    held = follow_positions(
        state.tables, selected.source_rows, requests, num_pages=len(arena.k)
    )
    by_rank = gather_heads(held.holders[:, None])
    heads = by_rank.shape[1] * arena.heads_per_page
    told = _to_host(state, thousandths(by_rank, heads=heads))
    # Views: the host's memory of a launch is held until the last of its requests has
    # passed again or has ended, 2 bytes a token, and so are 8 bytes a page of the
    # device. Positions are far more, so each request has a tensor of its own.
    shares = told.split([request.tokens for request in requests])
    for (launched, first), positions, own in zip(
        asking, held.positions, shares, strict=True
    ):
        pages = dest_pages[first : first + launched.decision.packed_new // PAGE_SIZE]
        launched.state.positions = KeptPositions(pages, positions)
        launched.token_shares = own
