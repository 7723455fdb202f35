"""What the ranks of a tensor-parallel server tell each other.

Every rank has its own scheduler, which decides alike from the same requests; none asks
another one while it serves. So what decisions rest on must be equal: sizes and modes
are agreed at start-up, and `SGLANG_KVC_CHECK_RANKS=1` compares every step.

Numbers travel from host to host, over Gloo; heads from device to device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

CHECK = "SGLANG_KVC_CHECK_RANKS"
"""Environment variable: compare every step of all ranks (a message a step)."""


def num_ranks() -> int:
    """Ranks among which the heads of this server are divided."""
    return int(get_parallel().attn_tp_size)


def extremes(values: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the least and the greatest of each value over all ranks.

    All ranks must call it, with as many values.
    """
    if num_ranks() == 1:
        return list(values), list(values)
    both = torch.tensor([[*values], [-value for value in values]], dtype=torch.int64)
    torch.distributed.all_reduce(
        both, op=torch.distributed.ReduceOp.MIN, group=_group().cpu_group
    )
    least, negated = both.tolist()
    return least, [-value for value in negated]


def checks_every_step() -> bool:
    """Whether `CHECK` is set, and there is something to compare."""
    return os.environ.get(CHECK, "") not in ("", "0") and num_ranks() > 1


def gather_heads(per_head: torch.Tensor) -> torch.Tensor:
    """Return what every rank knows of its heads.

    Parameters
    ----------
    per_head : [L, H] on the device, of this rank.

    Returns
    -------
    torch.Tensor
        [L, ranks * H], rank after rank. Ranks that hold copies of one KV head, with
        other query heads, have an entry each.
    """
    if num_ranks() == 1:
        return per_head
    gathered: torch.Tensor = _group().all_gather(per_head.contiguous(), dim=1)
    return gathered


def _group() -> Any:
    # Data-parallel attention is refused, so the ranks of attention are all of them.
    return get_parallel().tp_group
