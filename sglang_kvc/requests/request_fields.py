"""Which fields of a request this server serves, and within what bounds.

Called in the tokenizer process, before SGLang expands a batch or tokenizes, so that
what would end the scheduler, or keep it busy for everybody, costs its sender an HTTP
400. Every field of SGLang's ``GenerateReqInput`` is either checked here, refused by
name (`UNSERVED`), or known to be harmless (`HARMLESS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sglang_kvc.config.checks import check_choice, check_int, check_number
from sglang_kvc.config.shown import shown
from sglang_kvc.errors import (
    ConfigError,
    Section,
    UnsupportedModeError,
    points_to,
)
from sglang_kvc.requests.request_names import (
    MAX_NAME,
    check_name,
    check_rid,
    check_session,
)
from sglang_kvc.requests.request_prompts import Limits, check_overrides, check_prompts
from sglang_kvc.requests.sampling_fields import check_ids, check_sampling_params
from sglang_kvc.upstream.compat import in_force

MAX_ANSWERS = 1 << 16
"""Prompts of a request times `n`: each is a record in every process."""
MAX_TOP_LOGPROBS = 1024
MAX_LOGPROB_ENTRIES = 1 << 22
"""Positions of a prompt times what is reported for each: lists of Python numbers."""
MAX_PRIORITY = 1 << 31

_SINCE = {
    "cache_salt": "0.5.18",
    "data_parallel_rank": "0.5.18",
    "mm_content_hashes": "0.5.18",
    "video_config": "0.5.19",
    "kv_hints": "0.5.21",
    "sampling_logprobs_mode": "0.5.21",
    "token_indices_to_pool": "0.5.21",
    "return_flat_raw_output_top_logprobs": "0.5.22",
    "watermark": "0.5.22",
    "mm_processor_kwargs": "0.5.23",
}
"""First release of SGLang that has the field, where it is a later one."""
_UNTIL = {"mm_data_mooncake": "0.5.19"}
"""First release that no longer has it."""


def _existing(names: Iterable[str]) -> frozenset[str]:
    """Those that the installed SGLang has."""
    spans = {name: (_SINCE.get(name, ""), _UNTIL.get(name, "")) for name in names}
    return frozenset(name for name, span in spans.items() if in_force(*span))


_UNSERVED = {
    **dict.fromkeys(
        (
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
            "bootstrap_pair_key",
            "decode_tp_size",
            "disagg_prefill_dp_rank",
        ),
        "prefill/decode disaggregation",
    ),
    **dict.fromkeys(
        (
            "need_wait_for_mm_inputs",
            "num_items_assigned",
            "mm_data_mooncake",
            "encoder_urls",
        ),
        "encoder disaggregation",
    ),
    **dict.fromkeys(
        (
            *("image_data", "video_data", "audio_data", "mm_hashes", "images_config"),
            *("mm_content_hashes", "mm_processor_kwargs", "video_config"),
        ),
        "image, audio or video input",
    ),
    "multi_item_delimiter_indices": "multi-item scoring",
    "token_indices_to_pool": "scores at several tokens",
    "kv_hints": "hints to a hierarchical cache",
    "watermark": "watermarks",
    "return_routed_experts": "capture of routed experts",
    "return_indexer_topk": "capture of the sparse indexer",
    "http_worker_ipc": "several tokenizer workers",
    "lora_id": "adapters by their internal number (use lora_path)",
}
# In the order of the table: of several fields the same one is named every time.
_SENDABLE = _existing(_UNSERVED)
UNSERVED = {name: it for name, it in _UNSERVED.items() if name in _SENDABLE}

HARMLESS = _existing(
    (
        # Of a type that FastAPI has checked, and read by the tokenizer process only,
        # or compared with what the server offers there.
        *("return_text_in_logprobs", "return_flat_raw_top_logprobs", "stream"),
        *("return_flat_raw_top_logprobs_b64", "log_metrics", "background", "no_logs"),
        *("require_reasoning", "max_thinking_tokens", "return_bytes", "return_entropy"),
        *("return_prompt_token_ids", "routed_dp_rank"),
        *("external_trace_header", "return_hidden_states", "data_parallel_rank"),
        "return_flat_raw_output_top_logprobs",
        # Only read together with a field that is refused.
        *("use_audio_in_video", "modalities", "routed_experts_start_len"),
        *("max_dynamic_patch", "min_dynamic_patch"),
        *("image_max_dynamic_patch", "video_max_dynamic_patch"),
    )
)

_NAMES = _existing(("lora_path", "extra_key", "cache_salt", "custom_logit_processor"))
_LOGPROBS_MODES = ("selected", "support")
_ONE_NAME = ("session_id", "routing_key", "conversation_id")
CHECKED = _existing(
    (
        *("rid", "text", "input_ids", "input_embeds", "positional_embed_overrides"),
        *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"),
        *("token_ids_logprob", "return_sampling_mask", "session_params", "priority"),
        *("received_time", "sampling_logprobs_mode", *_NAMES, *_ONE_NAME),
        "custom_labels",
    )
)


def check_request(request: Any, limits: Limits) -> None:
    """Raise unless every field of a request can be served.

    Parameters
    ----------
    request : sglang.srt.managers.io_struct.GenerateReqInput
        As it arrived: one prompt or several, not normalized.
    limits : Limits

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    for name, feature in UNSERVED.items():
        value = getattr(request, name)
        if not _is_unset(value):
            raise UnsupportedModeError(
                f"{name}={shown(value)}: KV-Compress does not serve {feature}. Leave "
                f"{name} out."
            )
    prompts = check_prompts(request, limits)
    _check_batch(request, prompts, limits)
    for name in _NAMES:
        most = 1 << 20 if name == "custom_logit_processor" else MAX_NAME
        for value in _each(request, name, prompts):
            check_name(name, value, most)
    for name in _ONE_NAME:
        check_name(name, getattr(request, name), MAX_NAME)
    rids = request.rid if isinstance(request.rid, list) else [request.rid]
    for rid in rids:
        check_rid(rid)
    if request.priority is not None:
        check_int("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if request.received_time is not None:
        check_number("received_time", request.received_time, 0, 1e12)
    check_session(request.session_params)


@points_to(Section.REQUESTS)
def check_tokenized(request: Any, ids: Any) -> None:
    """Raise unless one prompt, now in tokens, can be served.

    Parameters
    ----------
    request : sglang.srt.managers.io_struct.GenerateReqInput
        Of one prompt.
    ids : list of int or None
        Tokens of the prompt; None if it came as embeddings.

    Raises
    ------
    ConfigError
        With a message meant for the sender of the request.
    """
    length = len(request.input_embeds if ids is None else ids)
    if length == 0:
        raise ConfigError("The prompt has no tokens. Send at least one.")
    if not request.return_logprob:
        return
    start = request.logprob_start_len
    positions = max(length - start, 0) if isinstance(start, int) and start >= 0 else 0
    named = len(request.token_ids_logprob or ())
    entries = positions * max(request.top_logprobs_num or 0, named)
    if entries > MAX_LOGPROB_ENTRIES:
        raise ConfigError(
            f"{positions} tokens of the prompt with {entries // positions} log "
            f"probabilities each are {entries}, at most {MAX_LOGPROB_ENTRIES} are "
            "served. Raise logprob_start_len, or ask for fewer."
        )


def _is_unset(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_unset(item) for item in value)
    return value is None or value is False or value == {}


def _check_batch(request: Any, prompts: int | None, limits: Limits) -> None:
    """Check what is given once, or once for every prompt."""
    top, answers = min(MAX_TOP_LOGPROBS, limits.vocab), 0
    for params in _each(request, "sampling_params", prompts):
        if params is not None:
            check_sampling_params(params, limits.vocab)
            answers = max(answers, params.get("n", 1))
    total = max(answers, 1) * (prompts or 1)
    if total > MAX_ANSWERS:
        raise ConfigError(
            f"{prompts or 1} prompts with n={max(answers, 1)} are {total} answers, at "
            f"most {MAX_ANSWERS} are served at once. Send fewer at a time."
        )
    for name in ("return_logprob", "return_sampling_mask"):
        for value in _each(request, name, prompts):
            if not isinstance(value, (bool, type(None))):
                raise ConfigError(f"{name} must be true or false, got {shown(value)}.")
    for name in _existing(["sampling_logprobs_mode"]):
        for value in _each(request, name, prompts):
            if value is not None:
                check_choice(name, value, _LOGPROBS_MODES)
    for name, low, high in (
        ("logprob_start_len", -1, limits.context),
        ("top_logprobs_num", 0, top),
    ):
        for value in _each(request, name, prompts):
            if value is not None:
                check_int(name, value, low, high)
    ids = request.token_ids_logprob
    if ids and isinstance(ids, list) and isinstance(ids[0], (list, type(None))):
        for value in _each(request, "token_ids_logprob", prompts):
            check_ids("token_ids_logprob", value or [], limits.vocab, MAX_TOP_LOGPROBS)
    elif ids is not None:
        # One number is a list of one.
        flat = ids if isinstance(ids, list) else [ids]
        check_ids("token_ids_logprob", flat, limits.vocab, MAX_TOP_LOGPROBS)
    for value in _each(request, "positional_embed_overrides", prompts):
        if value is not None:
            check_overrides(value, limits.width)


def _each(request: Any, name: str, prompts: int | None) -> list[Any]:
    """Values of a field that may be given once or once for every prompt."""
    value = getattr(request, name)
    if not isinstance(value, list):
        return [value]
    if len(value) != (1 if prompts is None else prompts) or (
        prompts is None and _number_of_answers(request) == 1
    ):
        raise ConfigError(
            f"{name} has {len(value)} entries for "
            f"{'one prompt' if prompts is None else f'{prompts} prompts'}. Give one "
            "value, or in a batch one for every prompt."
        )
    return value


def _number_of_answers(request: Any) -> Any:
    params = request.sampling_params
    return params.get("n", 1) if isinstance(params, Mapping) else 1
