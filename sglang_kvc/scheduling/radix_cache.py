"""SGLang's prefix cache for requests whose KVs are partly packed.

The tree itself is stock: it holds token pages of prompts, uncompressed and lossless.
Only the end of a request differs, because a compressed request owns packed pages and
a tail instead of a row of token pages, and holds no lock. The tree is another class in
each generation of SGLang, with another contract: `radix_cache_17` and `radix_cache_22`.
"""

from __future__ import annotations

from typing import Any

from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.upstream.generation import UPSTREAM


def build(context: Any) -> Any:
    """Factory for ``--radix-cache-backend kvcompress`` (TreeCacheBuildContext)."""
    tree = _tree(context)
    runtime = context.params.token_to_kv_pool_allocator.get_kvcache().runtime
    if runtime.options.sessions:
        host = runtime.state.host
        tree.sessions = SessionStore(host.count if host is not None else 0)
    return tree


def _tree(context: Any) -> Any:
    if UPSTREAM.frees_rows:
        from sglang.srt.mem_cache.registry import create_unified_radix_cache

        from sglang_kvc.scheduling.radix_cache_22 import RadixCache22

        return create_unified_radix_cache(context, cache_class=RadixCache22)
    from sglang_kvc.scheduling.radix_cache_17 import RadixCache17

    return RadixCache17(context.params)
