"""``meta_info["kv_compress"]``: from the scheduler's state to the client's dict.

SGLang carries per-token lists (``Req.customized_info``) and concatenates them in the
tokenizer process. `Report` answers a slice with one summary made at that moment;
`Accumulator` keeps the newest one, so the client sees a plain dict.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from sglang_kvc.upstream.generation import UPSTREAM

if TYPE_CHECKING:
    from _collections_abc import dict_keys

    from sglang_kvc.scheduling.request_state import RequestState
    from sglang_kvc.upstream.types import Req

KEY = "kv_compress"


class Report:
    """Per-token list for SGLang; any slice of it is the request's summary of now.

    It hangs on the request and must not hold it: a circle waits for the collector of
    garbage, with all its tokens, and in a large process that runs rarely.
    """

    def __init__(self, req: Req, state: RequestState) -> None:
        self._req, self._state = weakref.ref(req), state

    def __getitem__(self, index: slice) -> list[dict[str, Any]]:
        """List with one summary, whatever is asked for: the slice has no meaning."""
        del index
        req = self._req()
        assert req is not None
        length = len(req.origin_input_ids) + len(req.output_ids)
        if UPSTREAM.holds_memory(req):
            length = max(UPSTREAM.committed_len(req), 0)
        summary = self._state.summary(max(length, self._state.fold))
        if self._state.policy.request.report_tokens and req.finished_reason:
            # Once: a number a token is too long for every chunk of a stream.
            prompt_len = len(req.origin_input_ids)
            shares = self._state.prompt_token_shares(prompt_len)
            summary["prompt_token_shares"] = shares
        return [summary]


class Summary(dict[str, Any]):
    """The newest summary; absorbs SGLang's list operations."""

    def extend(self, items: list[dict[str, Any] | None]) -> None:
        """Take the last summary among `items`."""
        for item in items:
            if item is not None:
                self.update(item)


class Accumulator(dict[str, Any]):
    """``ReqState.customized_info_accumulated`` with a `Summary` for our key."""

    def __setitem__(self, key: str, value: Any) -> None:
        """Start our key with a `Summary` instead of a list."""
        super().__setitem__(key, Summary() if key == KEY else value)

    def keys(self) -> dict_keys[str, Any]:
        """The keys of per-token lists, which SGLang cuts and joins; not ours."""
        return {key: None for key in self if key != KEY}.keys()
