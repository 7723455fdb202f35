"""K and V as they are stored: in the model's dtype, or in e4m3, a byte an element.

An e4m3 cache holds k / k_scale and v / v_scale, one scale a layer (``Arena.scales``):

    byte  s eeee mmm  =  (-1) ** s  *  2 ** (e - 7)  *  (1 + m / 8)      0 < e
                         (-1) ** s  *  2 ** -6       *  m / 8            e = 0

The largest value is 448, and s 1111 111 is NaN. What is larger is stored as 448, NaN as
NaN. A quotient is rounded twice, as SGLang does it: to the model's dtype, then to
the nearest byte, ties to even.

Kernels take the bytes as uint8 (`stored_bytes`) and convert them in registers. Every
value is exact in fp16, so that is what tensor cores multiply, also where the model is
bf16: `matching_query`. GPUs before sm89 have no instruction for it: there, and in
Triton's interpreter, integer arithmetic does the same.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from sglang_kvc.kernels.layout import Arena

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def stored_bytes(cells: torch.Tensor) -> torch.Tensor:
    """View an e4m3 tensor as uint8, which all of torch and Triton can move; others as
    they are.
    """
    return cells.view(torch.uint8) if cells.dtype == E4M3 else cells


def kernel_arena(arena: Arena) -> Arena:
    """The arena as kernels take it: `stored_bytes` of K and V."""
    if arena.k.dtype != E4M3:
        return arena
    return arena._replace(k=stored_bytes(arena.k), v=stored_bytes(arena.v))


def narrow_ref(
    x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What is stored of `x` in a cache of `dtype`, see the module docstring."""
    if dtype != E4M3:
        return x.to(dtype)
    if scale is not None:
        x = (x.float() / scale).to(x.dtype)
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def widen_ref(
    stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What a cache holds, in `dtype`: `narrow_ref` undone, but for its rounding."""
    wide = stored.to(dtype)
    return wide if scale is None else wide.mul_(scale)


def gather_rows(
    cells: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Keys or values of some arena rows, [*rows.shape, D] in `dtype`.

    Parameters
    ----------
    cells : ``arena.k`` or ``arena.v``; only the rows are converted.
    rows : arena rows, int64.
    scale : of their layer, see `kv_scales`; None leaves it out.
    """
    flat = stored_bytes(cells).view(-1, cells.shape[-1])
    return widen_ref(flat[rows].view(cells.dtype), scale, dtype)


def kv_scales(
    arena: Arena, layer: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What stored keys and values of a layer are multiplied by; None is 1."""
    if arena.scales is None:
        return None, None
    return arena.scales[0, layer], arena.scales[1, layer]


@triton.jit
def widen(tile, dtype: tl.constexpr):
    """A loaded tile of K or V in `dtype`, if it is bytes; others are left as they are.

    Its scale is left out: it belongs to sums, which are fewer.
    """
    if tile.dtype == tl.uint8:
        if cuda_capability_geq(8, 9):
            half = tile.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            bits = tile.to(tl.uint16)
            shifted = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
            # Exponents of fp16 begin eight lower.
            half = shifted.to(tl.float16, bitcast=True) * 256.0
            half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
        tile = half.to(dtype)
    return tile


# Of two pairs in $2, four bytes: the first of each in fp16, then the second of each.
# The compiler takes three times as many instructions for it.
_UNZIP = tl.constexpr("""{
.reg .b32 low, high;
.reg .b16 first, second, rest;
prmt.b32 low, $2, 0, 0x4420;
prmt.b32 high, $2, 0, 0x4431;
mov.b32 {first, rest}, low;
mov.b32 {second, rest}, high;
cvt.rn.f16x2.e4m3x2 $0, first;
cvt.rn.f16x2.e4m3x2 $1, second;
}""")


@triton.jit
def load_pairs(
    cells, arena_row, ok, dtype: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr
):
    """Even and odd columns of rows of bytes, each [rows, HALF] in `dtype`; 0 if not ok.

    A product over the rows needs them transposed, which tensor cores load by 16 bits
    only. Two neighbouring bytes are as many; single ones would be read one by one.
    """
    pair = tl.arange(0, HALF)
    two = cells.to(tl.pointer_type(tl.uint16))
    cell = arena_row[:, None] * (D // 2) + pair[None, :]
    both = tl.load(two + cell, mask=ok[:, None] & (pair < D // 2)[None, :], other=0)
    if cuda_capability_geq(8, 9):
        even, odd = tl.inline_asm_elementwise(
            _UNZIP,
            "=r,=r,r",
            [both],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        even, odd = even.to(dtype), odd.to(dtype)
    else:
        even = widen((both & 0xFF).to(tl.uint8), dtype)
        odd = widen((both >> 8).to(tl.uint8), dtype)
    return even, odd


@triton.jit
def narrow(x, scale, cells):
    """What `cells` store of `x`: bytes of x / scale if they are bytes, else `x`."""
    if cells.dtype.element_ty == tl.uint8:
        y = tl.div_rn(x.to(tl.float32), scale).to(x.dtype).to(tl.float32)
        sign = (y.to(tl.uint32, bitcast=True) >> 24) & 0x80
        is_nan = y != y
        y = tl.minimum(tl.maximum(y, -448.0), 448.0)
        power = (y.to(tl.uint32, bitcast=True) & 0x7F800000).to(
            tl.float32, bitcast=True
        )
        # 1.5 * 2 ** 23 times the last bit that e4m3 has at this exponent: adding it
        # rounds to that bit.
        shift = tl.maximum(power, 0.015625) * 1572864.0
        y = (y + shift) - shift
        half = (y * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)
        low = tl.where(is_nan, 0x7F, (half.to(tl.uint32) >> 7) & 0x7F)
        x = (sign | low).to(tl.uint8)
    return x


@triton.jit
def load_scale(scales, index):
    """Scale number `index` of [2, L]; 1 where the cache is not e4m3.

    Not None: Triton 3.6 has no such value. The compiler drops a product with 1.
    """
    return tl.load(scales + index) if scales is not None else 1.0


@triton.jit
def matching_query(query, cells):
    """Queries in the dtype of products with K from `cells`: fp16 for bf16 beside bytes.

    Larger ones than 65504 do not fit; stock FlashAttention-3 casts them to e4m3.
    """
    if cells.dtype.element_ty == tl.uint8 and query.dtype == tl.bfloat16:
        query = query.to(tl.float16)
    return query


@triton.constexpr_function
def matching_dtype(dtype):
    """Dtype of products with K of `dtype`, as `matching_query` makes it of bf16."""
    return tl.float16 if dtype == tl.uint8 else dtype
