"""Name the prefixes of a text, page by page, so that they can be looked up.

Imports neither torch nor SGLang.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from sglang_kvc.config.pages import PAGE_SIZE

_BYTES = 16


class TextChain:
    """Digests of the prefixes of one growing text, each a number of whole pages long.

    Each digest is of the page and of the digest before it, so it names all tokens up to
    its page, and the tenant. They are computed once, as far as somebody asks.

    Parameters
    ----------
    tenant : whose text it is; texts of two tenants share no digest.
    """

    def __init__(self, tenant: tuple[str | None, ...]) -> None:
        self._digests = [_digest(repr(tenant).encode())]

    def prefix(self, ids: Sequence[int], length: int) -> bytes:
        """Digest of the first `length` tokens, a multiple of the page size.

        Parameters
        ----------
        ids : the text; what was asked for before must not have changed.
        length : tokens of the prefix.
        """
        pages = length // PAGE_SIZE
        while len(self._digests) <= pages:
            start = (len(self._digests) - 1) * PAGE_SIZE
            page = array("q", ids[start : start + PAGE_SIZE]).tobytes()
            self._digests.append(_digest(self._digests[-1] + page))
        return self._digests[pages]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=_BYTES).digest()
