"""Refuse what this server cannot compute with HTTP 400, before SGLang expands it.

Options of a request that came beside its sampling parameters are put into them.
"""

from __future__ import annotations

import uuid
from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager.generate_request",
    hook_type=HookType.BEFORE,
    expected_params=("self", "obj", "request"),
    reason=(
        "SGLang hands most fields to the scheduler unchecked: a token id beyond the "
        "vocabulary, `top_k` of 2**40 or an empty prompt ends the server, and n=10**9 "
        "fills the memory before anything is looked at. The scheduler never sees "
        "what a gateway lets through, `metadata` (OpenAI API) and `custom_labels`."
    ),
    upstream_link="managers/tokenizer_manager.py:895",
    remove_when="SGLang bounds every field of a request where it arrives.",
)


def hook(manager: Any, obj: Any, request: Any = None) -> None:
    """Raise ConfigError (a ValueError: HTTP 400) for this request alone."""
    from sglang_kvc.requests.arrival import check_arrival

    try:
        check_arrival(manager, obj, request)
    except ValueError:
        # SGLang looks at both two seconds after a stream has ended; what it does not
        # find breaks the connection, with the request that is on it by then. The name
        # is a new one: the one that came may be somebody else's.
        obj.is_single, obj.rid = True, uuid.uuid4().hex
        raise
