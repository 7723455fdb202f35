"""Stand-ins for SGLang's objects, as the installed generation would have them."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

from sglang_kvc.upstream.generation import UPSTREAM, Generation22

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
}
"""Config of a model that is served."""


def request_fields(
    *, committed: int = 0, prefix: int = 0, held: int | None = None
) -> dict[str, Any]:
    """Fields of a request's memory.

    Parameters
    ----------
    committed : tokens whose KVs are written.
    prefix : tokens that a prefill step does not compute.
    held : tokens of its row that have pages; None if it holds no memory.
    """
    if isinstance(UPSTREAM, Generation22):
        kv = SimpleNamespace(
            holds_kv=held is not None,
            kv_allocated_len=held or 0,
            kv_committed_len=committed,
            cache_protected_len=0,
            req_pool_idx=0,
        )
        return {"kv": kv, "prefix_len": prefix, "extend_end": None}
    kv17 = None if held is None else SimpleNamespace(kv_allocated_len=held)
    return {
        "kv": kv17,
        "kv_committed_len": committed,
        "prefix_indices": range(prefix),
        "extend_range": None,
    }


def adder_class(scheduler: Any) -> Any:
    """SGLang's PrefillAdder, as a scheduler would take it with our hooks installed.

    Parameters
    ----------
    scheduler : a Scheduler, or what has an allocator as one has it.
    """
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler

    if isinstance(UPSTREAM, Generation22):
        return Scheduler.get_prefill_adder_class(scheduler)
    return PrefillAdder


def counting_collector() -> Any:
    """One of SGLang's collectors, with a `registry` of its own."""
    from prometheus_client import CollectorRegistry, Counter, Gauge

    registry = CollectorRegistry()
    return SimpleNamespace(
        labels={"model_name": "m", "tp_rank": 0},
        registry=registry,
        _counter_cls=partial(Counter, registry=registry),
        _gauge_cls=partial(Gauge, registry=registry),
    )


class ChargedAdder:
    """Base of an adder's double: the sum of what a round has admitted."""

    def __init__(self, charged: float) -> None:
        self.rem_total_token_offset = charged
        self.memory_budget = SimpleNamespace(total_offset=charged)

    @property
    def charged(self) -> float:
        """The sum, in the one of both fields that this generation has."""
        return UPSTREAM.charged(self)

    @charged.setter
    def charged(self, tokens: float) -> None:
        UPSTREAM.set_charged(self, tokens)


def tree_of(params: Any) -> Any:
    """Our prefix cache without a server, whose settings its factory would ask for."""
    if isinstance(UPSTREAM, Generation22):
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

        from sglang_kvc.scheduling.radix_cache_22 import RadixCache22

        params.tree_components = (ComponentType.FULL,)
        return RadixCache22(params)
    from sglang_kvc.scheduling.radix_cache_17 import RadixCache17

    return RadixCache17(params)


def root_of(tree: Any) -> Any:
    """What a request without a prefix has as its last node."""
    if isinstance(UPSTREAM, Generation22):
        return tree.root_node_handle()
    return tree.root_node
