"""Methods of kvpress by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.quality.kvpress_repeat import Repetition


def presses() -> dict[str, Callable[[float], Any]]:
    """Methods by name; each is made with the fraction of KVs to discard.

    All compress in ``compress`` alone, as `kvpress_prefill.Kept` wants it. Repetition
    is none of kvpress; KVzip's own hooks do more than that.
    """
    import kvpress as kp  # type: ignore[import-not-found]

    return {
        "snapkv": lambda r: kp.SnapKVPress(compression_ratio=r),
        # Our window and pooling.
        "snapkv32": lambda r: kp.SnapKVPress(
            compression_ratio=r, window_size=32, kernel_size=7
        ),
        "adakv": lambda r: kp.AdaKVPress(kp.SnapKVPress(compression_ratio=r)),
        "expected": lambda r: kp.ExpectedAttentionPress(compression_ratio=r),
        "adakv-expected": lambda r: kp.AdaKVPress(
            kp.ExpectedAttentionPress(compression_ratio=r)
        ),
        "keydiff": lambda r: kp.KeyDiffPress(compression_ratio=r),
        "tova": lambda r: kp.TOVAPress(compression_ratio=r),
        "pyramidkv": lambda r: kp.PyramidKVPress(compression_ratio=r),
        "streaming": lambda r: kp.StreamingLLMPress(compression_ratio=r, n_sink=4),
        "random": lambda r: kp.RandomPress(compression_ratio=r),
        "repetition": Repetition,
    }


def observed_window(press: Any) -> int:
    """Tokens at a prompt's end that a press observes and always keeps.

    kvpress refuses prompts without more of them; nothing of those could be evicted.
    """
    inner = getattr(press, "press", press)
    return int(getattr(inner, "window_size", 0))
