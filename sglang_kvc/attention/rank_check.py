"""Compare what the ranks of a server are about to do; for tests and bug reports.

Ranks that disagree wait for each other for ever, or compute nonsense: each has its own
copy of the schedule. `upstream.ranks.CHECK` turns the comparison on.
"""

from __future__ import annotations

from typing import Any

from sglang_kvc.errors import RanksDivergedError
from sglang_kvc.scheduling.step_plan import StepPlan
from sglang_kvc.upstream import ranks


def check_ranks(plan: StepPlan | None, batch: Any) -> None:
    """Compare one step over all ranks; all must call it for every step.

    Parameters
    ----------
    plan : what is done around the forward.
    batch : SGLang's batch of the step.

    Raises
    ------
    RanksDivergedError
        On every rank, with what this one was about to do.
    """
    rows, lengths = len(batch.reqs), int(batch.seq_lens_cpu.sum())
    mine = [rows, lengths, 0 if plan is None else plan.digest()]
    least, most = ranks.extremes(mine)
    if least != most:
        passes = [] if plan is None else [it.decision for it in plan.passes]
        raise RanksDivergedError(
            f"the ranks of this server plan different steps: here {rows} requests of "
            f"{lengths} tokens in all, passes {passes}. Please report this, with the "
            "log of every rank."
        )
