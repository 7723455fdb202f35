"""Refuse bad compression options with HTTP 400."""

from __future__ import annotations

from typing import Any

from sglang_kvc.hooks import HookType, Patch
from sglang_kvc.request_options import validate_sampling_params

PATCH = Patch(
    target="sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
    hook_type=HookType.BEFORE,
    expected_params=("self", "obj", "input_ids"),
    reason=(
        "The tokenizer process answers at once; the scheduler would only see "
        "the request later."
    ),
    upstream_link="managers/tokenizer_manager.py:1140",
    remove_when="SGLang offers validated per-request extension fields.",
)


def hook(manager: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Raise ConfigError (a ValueError: HTTP 400) for this request alone."""
    del args, kwargs
    from sglang_kvc.server_args import options_of

    options = options_of(manager.server_args)
    if options is not None:
        validate_sampling_params(getattr(obj, "sampling_params", None), options)
