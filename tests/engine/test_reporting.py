"""meta_info["kv_compress"] in SGLang's tokenizer process."""

from __future__ import annotations

from sglang.srt.managers.tokenizer_manager import (
    TokenizerManager,
    _slice_streaming_output_meta_info,
)

from sglang_kvc.scheduling.reporting import KEY, Accumulator


def test_incremental_streaming() -> None:
    """--incremental-streaming-output cuts and joins per-token lists, not our dict."""
    state = Accumulator()
    chunks = []
    for offset, length in enumerate((700, 701)):
        # As TokenizerManager._handle_batch_output does.
        new = {"other": [length], KEY: [{"logical_tokens": length}]}
        meta_info = {}
        for key, values in new.items():
            if key not in state:
                state[key] = []
            state[key].extend(values)
            meta_info[key] = state[key]
        _slice_streaming_output_meta_info(meta_info, offset, state.keys())
        assert meta_info == {"other": [length], KEY: {"logical_tokens": length}}
        chunks.append({"text": "x", "output_ids": [1], "meta_info": meta_info})
    # A slow client: chunks that wait together become one.
    joined = TokenizerManager._coalesce_streaming_chunks(
        None, chunks, "rid", state.keys()
    )
    expected = {"other": [700, 701], KEY: {"logical_tokens": 701}}
    assert joined["meta_info"] == expected
