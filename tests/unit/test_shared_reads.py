"""The request table does not change under a kernel that still reads it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_kvc.attention import step
from sglang_kvc.attention.backend import KVCompressAttentionBackend
from sglang_kvc.scheduling.attached import attach_plan
from sglang_kvc.scheduling.step_plan import StepPlan
from sglang_kvc.upstream.generation import UPSTREAM, Generation22

asked = pytest.mark.skipif(
    not isinstance(UPSTREAM, Generation22),
    reason="SGLang 0.5.17 does not ask an attention backend when its reads end",
)


def backend() -> KVCompressAttentionBackend:
    return KVCompressAttentionBackend.__new__(KVCompressAttentionBackend)


@asked
@pytest.mark.parametrize("mode", list(ForwardMode), ids=lambda mode: mode.name)
def test_reads_end_behind_a_decode_graph_and_with_any_other_step(mode: Any) -> None:
    ends = base_attn_backend.SharedReadEnds
    expected = ends.POST_REPLAY if mode is ForwardMode.DECODE else ends.UNKNOWN
    assert backend().shared_read_ends(mode) is expected


@pytest.mark.skipif(
    not hasattr(KVCompressAttentionBackend, "resolve_prefill_shared_read_ends"),
    reason="asked from SGLang 0.5.23 on; on 0.5.22 what is declared for EXTEND counts",
)
@pytest.mark.parametrize("snapshot", [True, False])
def test_no_prefill_lets_go_before_its_end(snapshot: bool) -> None:
    batch = SimpleNamespace(forward_mode=ForwardMode.EXTEND)
    end = backend().resolve_prefill_shared_read_ends(
        batch, num_qo_tokens=1, build_snapshot=snapshot
    )
    assert end is base_attn_backend.SharedReadEnds.UNKNOWN


@pytest.mark.parametrize("passes", [True, False])
def test_a_pass_holds_the_table_longer_than_its_forward(
    monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    """SGLang waits for the event if there is one, and else for the whole step."""
    newer = isinstance(UPSTREAM, Generation22)
    event = "shared_read_done_event" if newer else "war_fastpath_read_done_event"
    runner = SimpleNamespace()
    worker = SimpleNamespace(
        model_runner=runner, last_shared_read_runner=runner, war_fastpath_runner=runner
    )
    runtime: Any = SimpleNamespace(
        checks_ranks=False,
        stopwatch=None,
        passes=SimpleNamespace(run=lambda launched: None),
        pass_scheduler=SimpleNamespace(launched=[]),
    )
    plan = StepPlan()
    if passes:
        plan.passes.append(SimpleNamespace(probe=None))
    batch = SimpleNamespace()
    attach_plan(batch, plan)
    read_done = object()

    def forward() -> Any:
        setattr(runner, event, read_done)
        return SimpleNamespace()

    step.run_step(runtime, worker, batch, forward)
    assert getattr(runner, event) is (None if passes else read_done)
