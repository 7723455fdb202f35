"""Configurations that differ from one by a single choice, for `decode_tune`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

from bench.kernels.batches import Shape
from sglang_kvc.kernels.decode_schedule import DecodeConfig, default_config

Fields = Mapping[str, Any]

VALUES: dict[str, tuple[int | None, ...]] = {
    "max_parts": (8, 11, 16, 22, 32, None),
    "row_slack": (None, 0, 1, 2, 3),
    "programs_per_sm": (1, 2, 3, 4),
    "num_warps": (4, 8),
    "tile": (32, 64, 128),
    "num_stages": (3, 5, 7),
    "merge_values": (4096, 8192, 16384),
}
TOGETHER: tuple[Fields, ...] = (
    # A third or fourth program fits only with a limit; without one, where 168 fit two.
    {"programs_per_sm": 3, "max_registers": 168},
    {"programs_per_sm": 4, "max_registers": 128},
    {"programs_per_sm": 2, "max_registers": None, "num_stages": 5},
    # As many bytes on their way as with tiles of 64 and 5 stages.
    {"tile": 32, "num_stages": 7},
    {"tile": 128, "num_warps": 8, "num_stages": 3},
    # Fewest rounds and most parts pull in opposite directions.
    {"max_parts": 32, "merge_values": 16384},
)


def configs_around(
    shape: Shape, fields: Fields | None = None, *, byte_cells: bool = False
) -> list[DecodeConfig]:
    """Return the shape's default with `fields` replaced, then its neighbours, once.

    Parameters
    ----------
    fields : as `parse_fields` gives them.
    byte_cells : whether K and V are e4m3.
    """
    group = shape.qo_heads // shape.kv_heads
    default = default_config(shape.head_dim, group, byte_cells=byte_cells)
    centre = default._replace(**(fields or {}))
    singly = [{name: value} for name, all_ in VALUES.items() for value in all_]
    changes = itertools.chain([{}], singly, TOGETHER)
    return list(dict.fromkeys(centre._replace(**change) for change in changes))


def parse_fields(text: str) -> dict[str, int | None]:
    """``num_stages=3,max_parts=none``: fields of a `DecodeConfig`."""
    fields: dict[str, int | None] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in DecodeConfig._fields:
            known = ", ".join(DecodeConfig._fields)
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
        if value.lower() != "none" and not value.isdecimal():
            raise argparse.ArgumentTypeError(f"{part!r} is not like {name}=4")
        fields[name] = None if value.lower() == "none" else int(value)
    return fields
