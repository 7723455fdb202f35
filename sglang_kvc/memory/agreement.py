"""Sizes and modes that the ranks of a server must have in common."""

from __future__ import annotations

from sglang_kvc.errors import ConfigError
from sglang_kvc.memory.device_state import DeviceState
from sglang_kvc.upstream import ranks


def agreed_chunk(state: DeviceState, chunk_size: int) -> int:
    """Check that all ranks have equal tables, and agree on how prompts are compressed.

    Every rank schedules for itself, so one with a larger pool would go on where
    another must wait. SGLang gives all of them the smallest; this is the check.

    Parameters
    ----------
    state : what this rank keeps on its device.
    chunk_size : tokens of a chunk that this rank could compress between chunks, or 0.

    Returns
    -------
    int
        The chunk size if every rank can, else 0.

    Raises
    ------
    ConfigError
        On every rank, if their tables differ.
    """
    slots, context = state.tables.req_to_token.shape
    mine = [state.arena.k.shape[0], slots, context, chunk_size]
    least, most = ranks.extremes(mine)
    if least[:3] != most[:3]:
        raise ConfigError(
            "the ranks of this server have tables of different sizes (pages, request "
            f"slots, tokens of context): {least[:3]} to {most[:3]}. Give "
            "--max-total-tokens and --max-running-requests, or GPUs of one kind."
        )
    return least[3]
