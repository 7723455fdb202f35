"""The last queries of a request, a byte an element, in pages of the arena.

A query of one head, D elements, is D bytes. A byte is a sign and a magnitude of at most
123, times a scale that the D bytes have in common: the least power of 2 that will do.
It needs no cell of its own: the 8 bits of its exponent are the lowest bits of the first
8 bytes, which therefore have magnitudes in steps of 2. So no byte is 124 or more, and a
page that was part of a ring holds no NaN and no infinity, whatever dtype reads it next.

The ring of a slot has w rows; the query of position p goes to row p % w. The rows lie
in the head blocks of whole pages: a block of K, S * D elements, takes as many rows of
its KV head's G query heads as fit, R = S * itemsize // G, and its block of V as many:

    row j of KV head lh: page ``pages[slot, j // (2 * R)]``, block lh of K, or of V if
    j // R is odd, bytes (j % R) * G * D and on

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``k``, ``v``            [pages, L, H, B]       uint8, the arena's blocks as B bytes
``pages``               [slots, n] int32       pages of each ring; 0 where there is none
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.layout import PAGE_SIZE, Arena

LARGEST = 123
SCALE_BITS = 8
# A float32 from 2 ** 23 on has its integer in its lowest bits.
_INTEGER = 8388608.0


class QueryRing(NamedTuple):
    """Rings of all slots; shapes in the module docstring.

    Attributes
    ----------
    k, v, pages : see there.
    window : w, rows of a ring.
    """

    k: torch.Tensor
    v: torch.Tensor
    pages: torch.Tensor
    window: int

    def clone(self) -> "QueryRing":
        """Copy all tensors."""
        k, v, pages = (part.clone() for part in self[:3])
        return QueryRing(k, v, pages, self.window)

    def rows_per_block(self, group: int, head_dim: int) -> int:
        """R, rows of a KV head that one block of K or V holds."""
        return self.k.shape[-1] // (group * head_dim)

    def sizes(self, group: int, head_dim: int) -> dict[str, int]:
        """W, R, B and N that kernels are compiled for."""
        return {
            "W": self.window,
            "R": self.rows_per_block(group, head_dim),
            "B": self.k.shape[-1],
            "N": self.pages.shape[1],
        }


def ring_pages(window: int, group: int, itemsize: int) -> int:
    """Pages of a ring of `window` rows.

    Parameters
    ----------
    window : w.
    group : query heads of a KV head, at most 16.
    itemsize : bytes of an element of K or V.
    """
    return -(-window // (2 * (PAGE_SIZE * itemsize // group)))


def ring_in(arena: Arena, pages: torch.Tensor, window: int) -> QueryRing:
    """Rings in the pages of an arena: the same memory, seen as bytes."""
    k, v = (cells.view(torch.uint8).flatten(3) for cells in arena[:2])
    return QueryRing(k, v, pages, window)


def encode_ref(q: torch.Tensor) -> torch.Tensor:
    """Bytes of queries [..., D], uint8; see the module docstring."""
    q = q.float()
    largest = q.abs().amax(-1, keepdim=True) * (1 / LARGEST)
    exponent = (largest.view(torch.int32) + 0x7FFFFF) >> 23
    # Of 0, and of what is no number.
    exponent = exponent.clamp(1, 200)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    lane = torch.arange(q.shape[-1], device=q.device)
    low = lane < SCALE_BITS
    size = q.abs() * inverse * torch.where(low, 0.5, 1.0)
    most = torch.where(low, LARGEST // 2, LARGEST).float()
    size = torch.where(size < most, size, most)
    whole = (size + _INTEGER).view(torch.int32) & 0x7F
    bit = (exponent >> lane.clamp_max(SCALE_BITS)) & 1
    whole = torch.where(low, 2 * whole + bit, whole)
    return (whole + torch.where(q < 0, 0x80, 0)).to(torch.uint8)


def decode_ref(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Queries [..., D] in `dtype` of their bytes."""
    byte = codes.int()
    lane = torch.arange(codes.shape[-1], device=codes.device)
    low = lane < SCALE_BITS
    bits = torch.where(low, (byte & 1) << lane.clamp_max(SCALE_BITS), 0)
    scale = (bits.sum(-1, keepdim=True).int() << 23).view(torch.float32)
    size = torch.where(low, byte & 0x7E, byte & 0x7F)
    signed = torch.where(byte >= 0x80, -size, size)
    return (signed.float() * scale).to(dtype)


def query_dtype(arena: Arena) -> torch.dtype:
    """Dtype in which queries of a ring multiply keys of `arena`."""
    wide = arena.k.element_size() > 1
    return arena.k.dtype if wide else torch.float16


def store_queries_ref(
    ring: QueryRing,
    slots: torch.Tensor,
    rows: torch.Tensor,
    q: torch.Tensor,
    *,
    layer: int,
) -> None:
    """Write queries [N, Hq, D] to rows [N] of the rings of slots [N], if they have one.

    Parameters
    ----------
    ring : written in place, at `layer`.
    """
    heads, head_dim = ring.k.shape[2], q.shape[-1]
    group = q.shape[1] // heads
    each = ring.rows_per_block(group, head_dim)
    page = ring.pages[slots, rows // (2 * each)].long()
    codes = encode_ref(q).view(-1, heads, group * head_dim)
    for half, cells in enumerate((ring.k, ring.v)):
        own = (page > 0) & (rows // each % 2 == half)
        lines = _lines(cells[:, layer], each, group * head_dim)
        lines[page[own], :, rows[own] % each] = codes[own]


def load_queries_ref(
    ring: QueryRing,
    slots: torch.Tensor,
    rows: torch.Tensor,
    *,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Queries [N, L, Hq, D] in `dtype` of rows [N] of the rings of slots [N]."""
    each = ring.rows_per_block(group, head_dim)
    page = ring.pages[slots, rows // (2 * each)].long()
    of_k, of_v = (
        _lines(cells, each, group * head_dim)[page, :, :, rows % each]
        for cells in (ring.k, ring.v)
    )
    in_v = rows // each % 2 == 1
    codes = torch.where(in_v[:, None, None, None], of_v, of_k)
    return decode_ref(codes.unflatten(-1, (group, head_dim)), dtype).flatten(2, 3)


def _lines(cells: torch.Tensor, each: int, width: int) -> torch.Tensor:
    """Blocks [..., B] of bytes as rows [..., R, G * D]; what is left over is no row."""
    return cells[..., : each * width].unflatten(-1, (each, width))


@triton.jit
def encode_queries(query, DP: tl.constexpr):
    """Bytes of queries [rows, DP], uint8; padding lanes are 0.

    Without a division: its slow path takes 85 registers of decode attention.
    """
    q = query.to(tl.float32)
    d = tl.arange(0, DP)[None, :]
    low = d < 8
    # Ordered as their sizes are; the largest integer of a warp is one instruction.
    bits = tl.max(q.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    # By 1 / 123.
    largest = bits.to(tl.float32, bitcast=True) * 0.008130081300813009
    exponent = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 200)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    size = tl.abs(q) * inverse[:, None] * tl.where(low, 0.5, 1.0)
    most = tl.where(low, 61.0, 123.0)
    # Also of NaN: it is not less.
    size = tl.where(size < most, size, most)
    whole = (size + 8388608.0).to(tl.int32, bitcast=True) & 0x7F
    bit = (exponent[:, None] >> tl.minimum(d, 8)) & 1
    whole = tl.where(low, 2 * whole + bit, whole)
    return (whole + tl.where(q < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def scales_of(first):
    """Scales [rows] fp32 of queries, from the first 8 of their bytes."""
    bits = (first.to(tl.int32) & 1) << tl.arange(0, 8)[None, :]
    return (tl.sum(bits, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_queries(codes, scale, dtype: tl.constexpr, DP: tl.constexpr):
    """Queries [rows, DP] in `dtype` of their bytes and scales."""
    byte = codes.to(tl.int32)
    low = tl.arange(0, DP)[None, :] < 8
    # A float32 from 2 ** 23 on: converting integers is slow.
    size = (byte & tl.where(low, 0x7E, 0x7F)) | 0x4B000000
    size = (
        size.to(tl.float32, bitcast=True) * scale[:, None] - scale[:, None] * 8388608.0
    )
    sign = (byte & 0x80) << 24
    return (
        (size.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True).to(dtype)
    )


@triton.jit
def ring_page(ring_pages, slot, row, mask, R: tl.constexpr, N: tl.constexpr):
    """Page of rows `row`, a number or a vector; 0: no ring, or not in `mask`."""
    return tl.load(ring_pages + slot * N + row // (2 * R), mask=mask, other=0)


@triton.jit
def ring_line(
    ring_k,
    ring_v,
    page,
    row,
    lh,
    LH: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """Where rows `row` of head `lh`, in these pages, begin: G * D bytes each."""
    cells = tl.where(row // R % 2 == 1, ring_v, ring_k)
    line = cells + (page.to(tl.int64) * LH + lh) * B + row % R * (G * D)
    # A choice of pointers is not seen to be aligned: it would be read by single bytes.
    return tl.multiple_of(line, 16) if D % 16 == 0 else line
