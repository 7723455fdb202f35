"""Batches that are on no queue: tokens for a row that exists, and a made-up prompt.

The first is a ForwardBatch from nothing, because its tokens belong to no prompt that
SGLang could schedule. The second goes through SGLang's own scheduling on purpose: it is
there to load all that a request will need, allocation and sampling as well.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_kvc.upstream.generation import UPSTREAM


def extend_batch(
    token_ids: Sequence[int],
    slot: int,
    prefix: int,
    positions: range,
    *,
    cells: torch.Tensor,
    to_device: Callable[[list[int]], torch.Tensor],
    lora_id: str | None = None,
) -> ForwardBatch:
    """An extend step of one request that SGLang has not scheduled; no logits wanted.

    Parameters
    ----------
    token_ids : what runs.
    slot : row of the request table; it names the pages of prefix and new tokens.
    prefix : tokens of the row that are computed already.
    positions : rotary positions of the tokens, which need not follow the prefix.
    cells : where their KVs go, int64 [len(token_ids)], token ids of the pool.
    to_device : makes an int64 tensor on the device without a host synchronisation.
    lora_id : adapter of the request.
    """
    count, end = len(token_ids), prefix + len(token_ids)
    # All numbers in one tensor: one copy to the device instead of six.
    numbers = to_device([*token_ids, slot, end, count, prefix, 0])
    slots, seq_lens, new, prefixes, start = numbers[count:].split(1)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=numbers[:count],
        req_pool_indices=slots,
        seq_lens=seq_lens,
        orig_seq_lens=seq_lens.int(),
        out_cache_loc=cells,
        seq_lens_sum=end,
        seq_lens_cpu=torch.tensor([end]),
        positions=torch.arange(positions.start, positions.stop, device=numbers.device),
        extend_num_tokens=count,
        extend_seq_lens=new.int(),
        extend_prefix_lens=prefixes.int(),
        extend_start_loc=start.int(),
        extend_prefix_lens_cpu=[prefix],
        extend_seq_lens_cpu=[count],
        extend_logprob_start_lens_cpu=[0],
        capture_hidden_mode=CaptureHiddenMode.NULL,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        is_extend_in_batch=True,
        lora_ids=[lora_id],
    )
    UPSTREAM.set_non_padded(batch, count)
    return batch


@contextmanager
def made_up_prompt(
    scheduler: Any, length: int, **sampling: float
) -> Iterator[ForwardBatch]:
    """A prompt as SGLang would prefill it, outside any queue; gives back what it takes.

    Parameters
    ----------
    scheduler : SGLang's Scheduler, with nothing running.
    length : tokens of the prompt.
    sampling : of SGLang's sampling parameters; greedy if none are given.
    """
    sampling = sampling or {"temperature": 0}
    req = Req(
        rid="kv-compress-warm-up",
        origin_input_text="",
        origin_input_ids=array("q", [1]) * length,
        sampling_params=SamplingParams(max_new_tokens=1, **sampling),
    )
    req.full_untruncated_fill_ids = req.origin_input_ids
    req.logprob_start_len = -1
    UPSTREAM.make_extend(req, length)
    slots, allocator = scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator
    batch = ScheduleBatch.init_new(
        [req],
        slots,
        allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        False,
        scheduler.spec_algorithm,
    )
    batch.prepare_for_extend()
    if batch.input_ids is None:
        batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
        batch.prefill_input_ids_cpu = None
    yield ForwardBatch.init_new(
        batch, scheduler.tp_worker.model_runner, return_hidden_states_before_norm=False
    )
    allocator.free(slots.req_to_token[UPSTREAM.slot(req), :length].long())
    slots.free(req)
    UPSTREAM.drop_memory(req)
