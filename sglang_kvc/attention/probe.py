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

from sglang_kvc.attention.step_context import forwards_with
from sglang_kvc.scheduling.step_plan import Fold
from sglang_kvc.upstream.batches import extend_batch

if TYPE_CHECKING:
    from sglang_kvc.runtime import KVCompressRuntime
    from sglang_kvc.scheduling.request_state import PassInFlight


@torch.no_grad()
def run_probe(
    runtime: KVCompressRuntime, model_runner: Any, launched: PassInFlight
) -> None:
    """Run the probe of a pass behind its chunk, on the forward stream.

    The request table names the probe's pages only until the next chunk takes those
    cells; SGLang writes them after this step, see `attention.step`.
    """
    decision, probe = launched.decision, launched.probe
    assert probe is not None
    count, length = len(probe.token_ids), decision.seq_len
    tokens = launched.dest_tokens[:count]
    table = runtime.state.tables.req_to_token
    table[decision.slot, length : length + count] = tokens.to(table.dtype)
    batch = extend_batch(
        probe.token_ids,
        decision.slot,
        length,
        range(probe.start, probe.start + count),
        cells=tokens,
        to_device=runtime.state.to_device,
        lora_id=launched.req.lora_id,
    )
    if (lora := getattr(model_runner, "lora_manager", None)) is not None:
        # The layers know the adapters of the chunk's batch, which has other rows.
        lora.prepare_lora_batch(batch)
    fold = Fold(decision.fold_old, decision.packed_old)
    with forwards_with(model_runner, [fold]):
        model_runner.forward(batch)
