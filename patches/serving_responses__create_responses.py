"""Show clients of /v1/responses what was kept, in the answer's `metadata`."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target=(
        "sglang.srt.entrypoints.openai.serving_responses:"
        "OpenAIServingResponses.create_responses"
    ),
    hook_type=HookType.AROUND,
    expected_params=("self", "request", "raw_request"),
    reason=(
        "SGLang shows no meta_info on this route, which has an entrance of its own."
    ),
    upstream_link="entrypoints/openai/serving_responses.py:316",
    remove_when="SGLang carries extra meta_info in every OpenAI answer.",
)


def hook(original: Any, serving: Any, request: Any, raw_request: Any) -> Any:
    """Add a summary for every choice if this server serves with KV-Compress."""
    from sglang_kvc.config.server_args import options_of

    if options_of(serving.tokenizer_manager.server_args) is None:
        return original(serving, request, raw_request)
    from sglang_kvc.requests.answer_summary import answer_with_summary

    return answer_with_summary(original, serving, request, raw_request)
