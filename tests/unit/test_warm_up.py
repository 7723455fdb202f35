"""Start-up compiles what requests will need."""

from sglang_kvc.eviction.runner import WARM_UP_TOKENS
from sglang_kvc.kernels.select import scan_block


def test_every_block_size_of_selection_is_compiled() -> None:
    heads = 256
    compiled = {scan_block(tokens * heads, heads) for tokens in WARM_UP_TOKENS}
    needed = {scan_block(tokens * heads, heads) for tokens in range(16, 200_000, 16)}
    assert compiled == needed
