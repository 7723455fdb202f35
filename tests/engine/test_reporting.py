"""meta_info["kv_compress"] in SGLang's tokenizer process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.tokenizer_manager import (
    TokenizerManager,
    _slice_streaming_output_meta_info,
)
from sglang.srt.plugins import load_plugins

from sglang_kvc.scheduling.reporting import KEY, Accumulator
from sglang_kvc.upstream.generation import UPSTREAM, Generation22

Info = dict[str, Any]


class Request:
    """What the tokenizer process keeps of a request with our options."""

    def __init__(self) -> None:
        load_plugins()
        newer = isinstance(UPSTREAM, Generation22)
        self.lists: Info = {} if newer else Accumulator()
        self.state = SimpleNamespace(
            customized_info_accumulated=self.lists, customized_info_reported_keys=set()
        )

    def message(self, new: dict[str, list[Any]]) -> Info:
        """The meta_info of a message, as ``_handle_batch_output`` makes it."""
        meta_info: Info = {}
        if isinstance(UPSTREAM, Generation22):
            batch = {key: [values] for key, values in new.items()}
            manager: Any = TokenizerManager.__new__(TokenizerManager)
            manager.update_request_meta_info(meta_info, self.state, batch, 0, None)
            return meta_info
        for key, values in new.items():
            if key not in self.lists:
                self.lists[key] = []
            self.lists[key].extend(values)
            meta_info[key] = self.lists[key]
        return meta_info


def test_incremental_streaming() -> None:
    """--incremental-streaming-output cuts and joins per-token lists, not our dict."""
    request = Request()
    chunks = []
    for offset, length in enumerate((700, 701)):
        new = {"other": [length], KEY: [{"logical_tokens": length}]}
        meta_info = request.message(new)
        _slice_streaming_output_meta_info(meta_info, offset, request.lists.keys())
        assert meta_info == {"other": [length], KEY: {"logical_tokens": length}}
        chunks.append({"text": "x", "output_ids": [1], "meta_info": meta_info})
    # A slow client: chunks that wait together become one.
    joined = TokenizerManager._coalesce_streaming_chunks(
        None, chunks, "rid", request.lists.keys()
    )
    expected = {"other": [700, 701], KEY: {"logical_tokens": 701}}
    assert joined["meta_info"] == expected


def test_a_message_without_a_summary_shows_the_last_one() -> None:
    """SGLang pads with None what a batch has no value for."""
    request = Request()
    assert request.message({KEY: [None]}).get(KEY) in (None, {})
    summary = {"logical_tokens": 700}
    assert request.message({KEY: [summary]})[KEY] == summary
    assert request.message({KEY: [None]})[KEY] == summary


def test_two_requests_do_not_share_a_summary() -> None:
    one, two = Request(), Request()
    one.message({KEY: [{"logical_tokens": 1}]})
    assert two.message({KEY: [{"logical_tokens": 2}]})[KEY] == {"logical_tokens": 2}
    assert one.message({KEY: []})[KEY] == {"logical_tokens": 1}
