"""Check a request as it arrives in the tokenizer process; count what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_kvc.config.series import ARRIVAL_REASONS, REFUSED
from sglang_kvc.config.server_args import options_of
from sglang_kvc.errors import ConfigError, Section, UnsupportedModeError, points_to
from sglang_kvc.requests.carried_options import body_of, carry_options, check_labels
from sglang_kvc.requests.request_fields import check_request, check_tokenized
from sglang_kvc.requests.request_options import validate_sampling_params
from sglang_kvc.requests.request_prompts import Limits
from sglang_kvc.upstream.collectors import make_counters
from sglang_kvc.upstream.generation import UPSTREAM


@points_to(Section.REQUESTS)
def check_arrival(manager: Any, request: Any, http_request: Any = None) -> None:
    """Check a request of SGLang's TokenizerManager as it arrives.

    Parameters
    ----------
    manager : sglang.srt.managers.tokenizer_manager.TokenizerManager
    request : GenerateReqInput, or EmbeddingReqInput
        The latter is left for SGLang to refuse. Options that came beside its sampling
        parameters are put into them.
    http_request : starlette.requests.Request, optional
        What it came with.

    Raises
    ------
    ConfigError
        If the server uses KV-Compress and cannot serve the request.
    """
    options = options_of(manager.server_args)
    if options is None or not hasattr(request, "sampling_params"):
        return
    with counted(manager, "options"), points_to(Section.OPTIONS):
        validate_sampling_params(request.sampling_params, options)
    if not hasattr(request, "top_logprobs_num"):
        return
    with counted(manager, "options"), points_to(Section.OPTIONS):
        carry_options(request, body_of(http_request), options)
    with counted(manager, "field"):
        known = manager.metrics_collector.labels if _counts(manager) else None
        check_labels(request.custom_labels, known)
        check_request(request, _limits(manager))


def check_tokens(manager: Any, request: Any, ids: Any) -> None:
    """Check one prompt of a request, now in tokens; see `check_tokenized`.

    Raises
    ------
    ConfigError
        If the server uses KV-Compress and cannot serve the prompt.
    """
    if options_of(manager.server_args) is not None:
        with counted(manager, "field"):
            check_tokenized(request, ids)


def _limits(manager: Any) -> Limits:
    model, tokenizer = manager.model_config, manager.tokenizer

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    counts = tokenizer is not None and not manager.allow_auto_truncate
    return Limits(
        vocab=model.vocab_size,
        context=manager.context_len,
        width=model.hidden_size,
        on_cpu=UPSTREAM.resolved(manager.server_args).device == "cpu",
        count=count if counts else None,
    )


@contextmanager
def counted(manager: Any, reason: str) -> Iterator[None]:
    """Count what is refused meanwhile, for ``/metrics`` if they are on.

    Parameters
    ----------
    manager : SGLang's TokenizerManager.
    reason : one of `series.ARRIVAL_REASONS`; a feature that is not served counts as
        ``unserved`` in its place.
    """
    # From the first request on, so that a dashboard has a 0 to start from.
    counters = _refused(manager.metrics_collector) if _counts(manager) else None
    try:
        yield
    except ConfigError as error:
        if counters is not None:
            unserved = isinstance(error, UnsupportedModeError)
            counters["unserved" if unserved else reason].inc()
        raise


def _counts(manager: Any) -> bool:
    return bool(getattr(manager, "enable_metrics", False))


def _refused(collector: Any) -> dict[str, Any]:
    """Counters by reason, made once a process."""
    made: dict[str, Any] | None = getattr(collector, "kv_compress_refused", None)
    if made is None:
        made = make_counters(
            collector, REFUSED.name, REFUSED.text, REFUSED.label, ARRIVAL_REASONS
        )
        collector.kv_compress_refused = made
    return made
