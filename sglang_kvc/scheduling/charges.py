"""Make SGLang charge a prompt what it really takes, for the time of one call.

The scheduler is one thread, so settings that are changed and put back are nobody
else's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sglang.srt.managers import schedule_policy

from sglang_kvc.scheduling.lengths import UNLIMITED
from sglang_kvc.upstream.types import SamplingParams


@contextmanager
def as_if_eos_counted(params: SamplingParams) -> Iterator[None]:
    """Let SGLang charge a request that ignores EOS as any other.

    Without a prefix cache it simulates such requests to their end, as if they kept
    every token.
    """
    ignore_eos, params.ignore_eos = params.ignore_eos, False
    try:
        yield
    finally:
        params.ignore_eos = ignore_eos


@contextmanager
def all_tokens_asked(params: SamplingParams) -> Iterator[None]:
    """Make the clip alone decide what SGLang charges for new tokens."""
    asked, params.max_new_tokens = params.max_new_tokens, UNLIMITED
    try:
        yield
    finally:
        params.max_new_tokens = asked


@contextmanager
def clip_of(tokens: int) -> Iterator[None]:
    """Give SGLang another clip of new tokens.

    It reads the module constant CLIP_MAX_NEW_TOKENS.
    """
    stock = schedule_policy.CLIP_MAX_NEW_TOKENS
    schedule_policy.CLIP_MAX_NEW_TOKENS = tokens
    try:
        yield
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = stock
