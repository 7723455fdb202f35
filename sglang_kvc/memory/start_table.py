"""What memory went where, as a table of the start-up log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import torch

from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.memory.device_state import DeviceState
from sglang_kvc.memory.metadata import GIB, MetadataBytes

OTHER = "SGLang's own buffers, the driver, other processes"


class Part(NamedTuple):
    """A row: what it is, its bytes, and a remark."""

    name: str
    size: int
    remark: str = ""


class DeviceBytes(NamedTuple):
    """Memory of a device, or of the machine if that is a CPU."""

    free: int
    total: int


def device_bytes(device: Any) -> DeviceBytes:
    """Ask for the memory of a device."""
    if torch.device(device).type == "cuda":
        return DeviceBytes(*torch.cuda.mem_get_info(device))
    memory = psutil.virtual_memory()
    return DeviceBytes(memory.available, memory.total)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights on this rank; those that are shared count once."""
    tensors = {id(it): it for it in (*model.parameters(), *model.buffers())}
    return sum(it.nbytes for it in tensors.values())


def parts_of(
    state: DeviceState, sizes: MetadataBytes, *, weights: int, graphs: int
) -> list[Part]:
    """Parts that this rank has set aside.

    Parameters
    ----------
    state : what lives on the device.
    sizes : what was charged for it beside K and V.
    weights, graphs : bytes of the model and of its CUDA graphs.
    """
    arena, slots = state.arena, state.tables.req_to_token.shape[0]
    tokens = arena.k.shape[0] * PAGE_SIZE
    chunks = "passes and chunks also take what prefill steps leave"
    return [
        Part("weights", weights),
        Part("keys and values", arena.k.nbytes + arena.v.nbytes, f"{tokens} tokens"),
        Part("scores", sizes.per_token * tokens, "one for every key"),
        Part("block tables", sizes.tables, f"{slots} slots"),
        Part("workspace", sizes.workspace, chunks),
        Part("CUDA graphs", graphs, "as SGLang has measured"),
    ]


def memory_table(parts: Sequence[Part], device: DeviceBytes) -> str:
    """Write parts, what else is in use, what is free, and the total.

    Parameters
    ----------
    parts : rows; their sum may exceed what is in use, because the pages of a CPU that
        nobody has written yet count as free.
    device : memory that all of it is part of.
    """
    named = sum(part.size for part in parts)
    rest = max(device.total - device.free - named, 0)
    rows = [
        *(part for part in parts if part.size),
        Part("other", rest, OTHER),
        Part("free", device.free),
        Part("total", device.total),
    ]
    width = max(len(row.name) for row in rows)
    lines = [
        f"  {row.name:<{width}} {row.size / GIB:>9.3f} GiB "
        f"{100 * row.size / device.total:>5.1f} %  {row.remark}".rstrip()
        for row in rows
    ]
    return "\n".join(lines)
