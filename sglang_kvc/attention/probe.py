"""Let the end of a prompt look at each chunk before the chunk is compressed.

What a long prompt asks for stands at its end, where the last queries of an early chunk
know nothing of it: what they keep is what the text is about, not what will be asked.
So the prompt's last tokens run behind every chunk, at their own positions, and their
queries take the place of the chunk's in the ring (as in FINCH, Corallo and Papotti,
TACL 2024). Nothing else of them stays: their KVs go to pages that the pass is about to
fill, and no pass scores them.

Several passes are then scored by the same queries, so they do not add up: see
`PassPlan.repeated`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

if TYPE_CHECKING:
    from sglang_kvc.runtime import KVCompressRuntime
    from sglang_kvc.scheduling.request_state import PassRecord


@torch.no_grad()
def run_probe(
    runtime: KVCompressRuntime, model_runner: Any, record: PassRecord
) -> None:
    """Run a record's probe behind its chunk, on the forward stream.

    The request table names the probe's pages only until the next chunk takes those
    cells; SGLang writes them after this step, see `attention.step`.
    """
    count, length = len(record.probe), record.seq_len
    tokens = record.target[:count]
    table = runtime.state.tables.req_to_token
    table[record.slot, length : length + count] = tokens.to(table.dtype)
    numbers = runtime.state.to_device(
        [*record.probe, record.slot, length + count, count, length, 0]
    )
    slot, end, new, prefix, zero = numbers[count:].split(1)
    positions = torch.arange(
        record.prompt_len - count, record.prompt_len, device=numbers.device
    )
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=numbers[:count],
        req_pool_indices=slot,
        seq_lens=end,
        orig_seq_lens=end.int(),
        out_cache_loc=tokens,
        seq_lens_sum=length + count,
        seq_lens_cpu=torch.tensor([length + count]),
        positions=positions,
        extend_num_tokens=count,
        extend_seq_lens=new.int(),
        extend_prefix_lens=prefix.int(),
        extend_start_loc=zero.int(),
        extend_prefix_lens_cpu=[length],
        extend_seq_lens_cpu=[count],
        extend_logprob_start_lens_cpu=[0],
        capture_hidden_mode=CaptureHiddenMode.NULL,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        is_extend_in_batch=True,
        lora_ids=[record.req.lora_id],
    )
    batch.num_token_non_padded_cpu = count
    if (lora := getattr(model_runner, "lora_manager", None)) is not None:
        # The layers know the adapters of the chunk's batch, which has other rows.
        lora.prepare_lora_batch(batch)
    runtime.prefill_folds = [(record.fold_old, record.budget_old)]
    model_runner.forward(batch)
