"""Refuse a prompt, now that its tokens are known, with HTTP 400."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
    hook_type=HookType.BEFORE,
    expected_params=("self", "obj", "input_ids"),
    reason=(
        "A prompt without a token ends the scheduler; log probabilities of many "
        "tokens keep it from everybody's next step."
    ),
    upstream_link="managers/tokenizer_manager.py:1307",
    remove_when="SGLang refuses both.",
)


def hook(manager: Any, obj: Any, input_ids: Any) -> None:
    """Raise ConfigError (a ValueError: HTTP 400) for this request alone."""
    from sglang_kvc.requests.arrival import check_tokens

    check_tokens(manager, obj, input_ids)
