"""What has to hold when all is done."""

from __future__ import annotations

from bench.common.server import count_log
from bench.features.asking import Asker
from bench.features.verdicts import Check, expect

IDLE_S = 60.0


def every_page(asker: Asker) -> str:
    """Idle, nothing used; flushed, still nothing used."""
    idle = asker.server.wait_idle(IDLE_S)
    used = [idle["num_used_tokens"]]
    asker.server.flush()
    used.append(asker.server.wait_idle(IDLE_S)["num_used_tokens"])
    expect(used == [0, 0], "no token used, before and after a flush", used)
    return "no token used, flushed, no token used"


def fits_again(asker: Asker) -> str:
    """A prompt of nearly half the pool, whole: what leaked would be missed."""
    reply = asker.generate(asker.text(asker.sizes.middle), rate=None, ignore_eos=True)
    expect(len(reply.ids) == asker.sizes.output, "a whole answer", reply)
    return f"{reply.prompt} tokens answered"


def log(asker: Asker) -> str:
    """No exception in the log, and the server is alive."""
    found = count_log(asker.server.log_text())
    expect(not found["tracebacks_in_log"], "no traceback in the log", found)
    expect(asker.server.alive(), "a server that runs", "one that has ended")
    return f"{found['retracted_by_log']} retracted"


CHECKS = (
    Check("every page free, and flushed", every_page),
    Check("it still answers", fits_again),
    Check("every page free again", every_page),
    Check("log", log),
)
