"""The one place that knows how SGLang's releases differ for a running server.

`UPSTREAM` answers for the installed release. Everything else is written once, against
`upstream.types`. A release whose fields have moved gets a class here, and
``python -m sglang_kvc.tools.check_upstream`` says which fields those are.

============ =====================================================================
generation   releases
============ =====================================================================
Generation17 0.5.17: the memory of a request stands on the request
Generation22 0.5.22 and 0.5.23: it stands on a record that lives as long as the
             request; the tree has one call each to insert, free and unlock
============ =====================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from sglang_kvc.upstream.compat import in_force, sglang_version


class Generation(ABC):
    """How one generation of SGLang says what we need to know.

    Attributes
    ----------
    checker_counts_waiting : whether SGLang's busy check counts a prompt that waits
        between two chunks by itself.
    frees_rows : whether the tree is asked to free parts of a row, by the record of the
        memory alone.
    """

    checker_counts_waiting: bool
    frees_rows: bool

    # The memory of a request ----------------------------------------------------------

    @abstractmethod
    def holds_memory(self, req: Any) -> bool:
        """Whether the request has a row of the request table, with pages."""

    @abstractmethod
    def slot(self, req: Any) -> int:
        """Its row."""

    @abstractmethod
    def committed_len(self, req: Any) -> int:
        """Tokens whose KVs are written, or will be by the running step."""

    def allocated_len(self, req: Any) -> int:
        """Tokens of the row that have pages."""
        length: int = req.kv.kv_allocated_len
        return length

    @abstractmethod
    def protected_len(self, req: Any) -> int:
        """Tokens from the start of the row that belong to the tree."""

    @abstractmethod
    def set_protected_len(self, req: Any, tokens: int) -> None:
        """Change it; SGLang counts the rest of the row as the request's own."""

    # Prefill --------------------------------------------------------------------------

    @abstractmethod
    def prefix_len(self, req: Any) -> int:
        """Tokens that a prefill step does not compute: cached, or of earlier chunks."""

    @abstractmethod
    def extend_end(self, req: Any) -> int | None:
        """Where the prefill step ends; None if the request is in none."""

    @abstractmethod
    def make_extend(self, req: Any, length: int) -> None:
        """Let a request that SGLang has not scheduled prefill `length` tokens."""

    @abstractmethod
    def drop_memory(self, req: Any) -> None:
        """Let it forget its memory, which was given back."""

    @abstractmethod
    def prefix(self, req: Any) -> tuple[Any, ...]:
        """What the request starts from, for `set_prefix`."""

    @abstractmethod
    def set_prefix(self, req: Any, prefix: tuple[Any, ...]) -> None:
        """Let it start from what `prefix` said, or `prefix_at` says."""

    @abstractmethod
    def prefix_at(self, row: Any, node: Any) -> tuple[Any, ...]:
        """A prefix of a node of the tree; `row`: a token id for each of its tokens."""

    # Tree, admission, worker ----------------------------------------------------------

    @abstractmethod
    def radix_key(self, token_ids: Any, req: Any) -> Any:
        """Key of a prefix of this request, in its tenant's part of the tree."""

    @abstractmethod
    def tenant(self, req: Any) -> tuple[str | None, ...]:
        """Who may see what is computed for this request; `radix_key` has it, too."""

    @abstractmethod
    def release_prefix(self, tree_cache: Any, req: Any) -> None:
        """Unlock what the request has locked; from now on it holds no prefix."""

    @abstractmethod
    def charged(self, adder: Any) -> float:
        """Tokens that must stay free for what a round of admission has admitted."""

    @abstractmethod
    def set_charged(self, adder: Any, tokens: float) -> None:
        """Change it."""

    @abstractmethod
    def wait_for_step(self, worker: Any) -> None:
        """Make SGLang wait for the whole step before it changes the request table."""

    @abstractmethod
    def set_non_padded(self, batch: Any, tokens: int) -> None:
        """Say how many tokens of a ForwardBatch are real."""

    # Settings -------------------------------------------------------------------------

    @abstractmethod
    def resolved(self, server_args: Any) -> Any:
        """The settings that will be in force, by attribute."""

    @abstractmethod
    def model_config(self, server_args: Any) -> Any:
        """SGLang's ModelConfig for these settings."""


class Generation17(Generation):
    """SGLang 0.5.17."""

    checker_counts_waiting = False
    frees_rows = False

    def holds_memory(self, req: Any) -> bool:
        """See `Generation`."""
        return req.kv is not None

    def slot(self, req: Any) -> int:
        """See `Generation`."""
        return int(req.req_pool_idx)

    def committed_len(self, req: Any) -> int:
        """See `Generation`."""
        length: int = req.kv_committed_len
        return length

    def protected_len(self, req: Any) -> int:
        """See `Generation`."""
        length: int = req.cache_protected_len
        return length

    def set_protected_len(self, req: Any, tokens: int) -> None:
        """See `Generation`."""
        req.cache_protected_len = tokens

    def prefix_len(self, req: Any) -> int:
        """See `Generation`."""
        return len(req.prefix_indices)

    def extend_end(self, req: Any) -> int | None:
        """See `Generation`."""
        return req.extend_range.end if req.extend_range is not None else None

    def make_extend(self, req: Any, length: int) -> None:
        """See `Generation`."""
        req.set_extend_range(0, length)

    def prefix(self, req: Any) -> tuple[Any, ...]:
        """See `Generation`."""
        nodes = (req.last_node, req.last_host_node, req.best_match_node)
        return (*nodes, req.prefix_indices, req.cache_protected_len)

    def set_prefix(self, req: Any, prefix: tuple[Any, ...]) -> None:
        """See `Generation`."""
        req.last_node, req.last_host_node, req.best_match_node, *rest = prefix
        req.prefix_indices, req.cache_protected_len = rest

    def prefix_at(self, row: Any, node: Any) -> tuple[Any, ...]:
        """See `Generation`."""
        return node, node, node, row, len(row)

    def drop_memory(self, req: Any) -> None:
        """See `Generation`."""
        req.kv = None

    def radix_key(self, token_ids: Any, req: Any) -> Any:
        """See `Generation`. The OpenAI API puts a salt into ``extra_key``."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(token_ids, req.extra_key)

    def tenant(self, req: Any) -> tuple[str | None, ...]:
        """See `Generation`."""
        return req.extra_key, req.lora_id

    def release_prefix(self, tree_cache: Any, req: Any) -> None:
        """See `Generation`."""
        if req.last_node is not None:
            tree_cache.dec_lock_ref(req.last_node)
        req.last_node = tree_cache.root_node
        req.prefix_indices = req.prefix_indices[:0]

    def charged(self, adder: Any) -> float:
        """See `Generation`."""
        tokens: float = adder.rem_total_token_offset
        return tokens

    def set_charged(self, adder: Any, tokens: float) -> None:
        """See `Generation`."""
        adder.rem_total_token_offset = tokens

    def wait_for_step(self, worker: Any) -> None:
        """See `Generation`."""
        worker.war_fastpath_runner.war_fastpath_read_done_event = None

    def set_non_padded(self, batch: Any, tokens: int) -> None:
        """See `Generation`."""
        batch.num_token_non_padded_cpu = tokens

    def resolved(self, server_args: Any) -> Any:
        """See `Generation`. The record is resolved when it is built."""
        return server_args

    def model_config(self, server_args: Any) -> Any:
        """See `Generation`."""
        return server_args.get_model_config()


class Generation22(Generation):
    """SGLang 0.5.22 and 0.5.23."""

    checker_counts_waiting = True
    frees_rows = True

    def holds_memory(self, req: Any) -> bool:
        """See `Generation`. The record lives as long as the request."""
        held: bool = req.kv.holds_kv
        return held

    def slot(self, req: Any) -> int:
        """See `Generation`."""
        return int(req.kv.req_pool_idx)

    def committed_len(self, req: Any) -> int:
        """See `Generation`."""
        length: int = req.kv.kv_committed_len
        return length

    def protected_len(self, req: Any) -> int:
        """See `Generation`."""
        length: int = req.kv.cache_protected_len
        return length

    def set_protected_len(self, req: Any, tokens: int) -> None:
        """See `Generation`."""
        req.kv.cache_protected_len = tokens

    def prefix_len(self, req: Any) -> int:
        """See `Generation`."""
        length: int = req.prefix_len
        return length

    def extend_end(self, req: Any) -> int | None:
        """See `Generation`."""
        end: int | None = req.extend_end
        return end

    def make_extend(self, req: Any, length: int) -> None:
        """See `Generation`."""
        req.extend_end = length

    def prefix(self, req: Any) -> tuple[Any, ...]:
        """See `Generation`."""
        nodes = (req.last_node, req.last_host_node, req.best_match_node)
        return (*nodes, req.prefix_len, req.kv.cache_protected_len)

    def set_prefix(self, req: Any, prefix: tuple[Any, ...]) -> None:
        """See `Generation`."""
        req.last_node, req.last_host_node, req.best_match_node, *rest = prefix
        req.prefix_len, req.kv.cache_protected_len = rest

    def prefix_at(self, row: Any, node: Any) -> tuple[Any, ...]:
        """See `Generation`. The tree is asked for the row."""
        return node, node, node, len(row), len(row)

    def drop_memory(self, req: Any) -> None:
        """See `Generation`."""
        req.kv.mark_kv_released()

    def radix_key(self, token_ids: Any, req: Any) -> Any:
        """See `Generation`. Without the salt a prefix would be everybody's."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        return RadixKey(token_ids, req.extra_key, cache_salt=req.cache_salt)

    def tenant(self, req: Any) -> tuple[str | None, ...]:
        """See `Generation`."""
        return req.extra_key, req.cache_salt, req.lora_id

    def release_prefix(self, tree_cache: Any, req: Any) -> None:
        """See `Generation`. The request's own row goes on as its prefix."""
        tree_cache.unlock(req.lock)
        req.lock = None
        req.last_node = tree_cache.root_node_handle(req.extra_key)

    def charged(self, adder: Any) -> float:
        """See `Generation`."""
        tokens: float = adder.memory_budget.total_offset
        return tokens

    def set_charged(self, adder: Any, tokens: float) -> None:
        """See `Generation`."""
        adder.memory_budget.total_offset = tokens

    def wait_for_step(self, worker: Any) -> None:
        """See `Generation`."""
        worker.last_shared_read_runner.shared_read_done_event = None

    def set_non_padded(self, batch: Any, tokens: int) -> None:
        """See `Generation`."""
        batch.global_num_token_non_padded_cpu = tokens

    def resolved(self, server_args: Any) -> Any:
        """See `Generation`. The record itself holds what the operator has typed."""
        from sglang.srt.arg_groups.model_override_base import resolving_view

        return resolving_view(server_args)

    def model_config(self, server_args: Any) -> Any:
        """See `Generation`."""
        from sglang.srt.arg_groups.model_override_base import model_config_of

        return model_config_of(server_args)


def generation_of(version: str) -> Generation:
    """The generation of a release; the oldest for what is no release at all."""
    newer = in_force("0.5.22", version=version)
    return Generation22() if newer else Generation17()


UPSTREAM = generation_of(sglang_version())
"""Of the installed release."""
