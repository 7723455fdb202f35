"""Which ops read or write K and V, so that the shape and the dtype of them matter."""

TOUCH_KV = (
    "append_kv",
    "decode_attention",
    "observe_scores",
    "key_diff",
    "pack_entries",
    "packed_prefill",
)
"""Names; `test_ops.py` finds out whether that is true."""
