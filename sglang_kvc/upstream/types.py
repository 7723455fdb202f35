"""What we touch of SGLang's objects on the host, and nothing else of them.

SGLang passes its own classes; here stand the fields and methods that we read, set or
call, so that a typo is found by mypy and a new release is compared with this page
(``python -m sglang_kvc.tools.check_upstream``). Doubles in tests implement them. What
has moved from release to release stands in `generation`.
Tensors are named without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

TokenIds = Sequence[int]


class SamplingParams(Protocol):
    """Of a request; SGLang has limited ``max_new_tokens`` already."""

    max_new_tokens: int
    min_new_tokens: int
    ignore_eos: bool
    custom_params: Any


class Req(Protocol):
    """A request in the scheduler.

    Attributes
    ----------
    rid : its id.
    origin_input_ids, output_ids : prompt and answer.
    full_untruncated_fill_ids : what is to be prefilled: the prompt, after a retraction
        with what was decoded.
    kv : SGLang's record of its memory; what is in it, see `generation`.
    finished_reason, to_finish : set once it ends, or must.
    """

    rid: str
    origin_input_ids: Any
    output_ids: Any
    full_untruncated_fill_ids: TokenIds
    sampling_params: SamplingParams
    kv: Any
    extra_key: str | None
    lora_id: str | None
    input_embeds: Any
    positional_embed_overrides: Any
    finished_reason: Any
    to_finish: Any
    time_stats: Any
    customized_info: dict[str, Any] | None
    session: Any

    def init_next_round_input(self, tree_cache: Any) -> None:
        """Match the prefix, and set what is to be prefilled."""


class Allocator(Protocol):
    """The paged token allocator of a pool of `size` tokens."""

    size: int

    def available_size(self) -> int:
        """Free tokens."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Token ids of fresh pages; None if there are not enough."""

    def free_segment(self, indices: torch.Tensor, *, start_pos: int) -> None:
        """Free the pages of consecutive tokens, the first of them at `start_pos`."""

    def free_group_begin(self) -> None:
        """Collect what is freed until the end of the group."""

    def free_group_end(self) -> None:
        """Free what was collected."""

    def get_kvcache(self) -> Any:
        """The KV pool."""


class ReqToTokenPool(Protocol):
    """The request table, int32 [slots, max length]."""

    req_to_token: torch.Tensor


class TreeCache(Protocol):
    """The prefix cache."""

    disable: bool
    req_to_token_pool: ReqToTokenPool
    token_to_kv_pool_allocator: Allocator

    def evictable_size(self) -> int:
        """Tokens that nobody holds."""

    def note_packed(self, state: Any) -> None:
        """Ours: a request's row begins with packed pages."""

    def hand_over(self, req: Any, prompt: Any, own_from: int) -> None:
        """Ours: take the pages of a prompt that has been packed."""

    @property
    def sessions(self) -> Any:
        """Ours: the snapshots that the tree holds; None if it is to hold none."""

    def take_copies(self) -> Any:
        """Ours: copies to host memory and back that the next step has to make."""

    @property
    def room_beside_snapshots(self) -> float:
        """Ours: tokens that can be taken without evicting a snapshot."""

    @property
    def reclaimable(self) -> int:
        """Ours: tokens that eviction can free, loans to waiting requests included."""


class ScheduleBatch(Protocol):
    """A batch on the scheduler's side."""

    reqs: list[Any]
    forward_mode: Any
    batch_is_full: bool
    seq_lens_cpu: torch.Tensor
    req_pool_indices_cpu: torch.Tensor
    tree_cache: TreeCache
    token_to_kv_pool_allocator: Allocator


class PrefillAdder(Protocol):
    """One round of admission.

    Attributes
    ----------
    rem_chunk_tokens : what is left of this step's chunk; None without chunks.
    can_run_list, preempt_list : who was admitted, and who must make room.
    log_input_tokens : that those admitted have to compute.
    """

    running_batch: Any
    log_input_tokens: int
    tree_cache: Any
    token_to_kv_pool_allocator: Any
    can_run_list: list[Any]
    preempt_list: list[Any]
    rem_chunk_tokens: Any

    @property
    def rem_total_tokens(self) -> float:
        """Free and evictable tokens less the offset."""

    def budget_state(self) -> Any:
        """Whether more may be added."""

    def _get_running_request_total_token_offset(self, req: Any) -> float:
        """What a running request may still add."""


class InvariantChecker(Protocol):
    """SGLang's check that no page is lost."""

    def get_last_batch(self) -> Any:
        """The batch whose result is not processed."""

    def get_running_batch(self) -> Any:
        """The batch that decodes."""


class Scheduler(Protocol):
    """SGLang's scheduler."""

    running_batch: Any
    last_batch: Any
    waiting_queue: list[Any]
    chunked_req: Any
    tree_cache: Any
    token_to_kv_pool_allocator: Any
    ipc_channels: Any
    metrics_collector_context: Any
    enable_priority_scheduling: bool

    def _add_request_to_queue(self, req: Any) -> None:
        """Put a request into the waiting queue, or refuse it."""
