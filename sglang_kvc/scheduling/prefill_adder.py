"""SGLang's PrefillAdder with our admission, where SGLang asks which class to take.

On older releases hooks stand on the same four methods
(``patches/schedule_policy__*``). Both call the functions of `admission` and `headroom`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from sglang_kvc.scheduling.admission import add_chunked, add_one, preempt
from sglang_kvc.scheduling.headroom import running_charge
from sglang_kvc.scheduling.server import Server
from sglang_kvc.upstream.types import Req

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_policy import PrefillAdder as _Stock
else:
    # Whatever `admitting` puts behind it.
    _Stock = object


@cache
def admitting(stock: type[Any]) -> type[Any]:
    """Make a class of `stock` that charges and chunks each request as it fits.

    Parameters
    ----------
    stock : SGLang's PrefillAdder, or what another plugin has put in its place; only
        for a server whose pool is ours.

    Returns
    -------
    type
        The same class in every round.
    """
    return type(f"KVCompress{stock.__name__}", (_Admission, stock), {})


class _Admission(_Stock):
    """Methods that go before those of SGLang's own class."""

    @property
    def _kv_compress_server(self) -> Server:
        server: Server = self.token_to_kv_pool_allocator.get_kvcache().runtime
        return server

    def _get_running_request_total_token_offset(self, req: Req) -> float:
        stock = super()._get_running_request_total_token_offset(req)
        return running_charge(self, req, stock)

    def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> Any:
        call = partial(super().add_one_req, req, *args, **kwargs)
        return add_one(self, self._kv_compress_server, req, call)

    def add_chunked_req(self, req: Req, *args: Any, **kwargs: Any) -> Any:
        call = partial(super().add_chunked_req, req, *args, **kwargs)
        return add_chunked(self, self._kv_compress_server, req, call)

    def preempt_to_schedule(self, req: Req, *args: Any, **kwargs: Any) -> bool:
        call = partial(super().preempt_to_schedule, req, *args, **kwargs)
        return preempt(self, self._kv_compress_server, req, call)
