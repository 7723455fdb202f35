"""The server that random loads are served with: tiny, strict, every page audited."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine.inprocess import InProcessScheduler, make_server_args
from tests.engine.stress import STRICT, PageAudit
from tests.engine.tiny_model import ONE_LAYER, write_tiny_model


@contextmanager
def audited(
    pool: int, **options: Any
) -> Iterator[tuple[InProcessScheduler, PageAudit]]:
    """A scheduler and the audit of its pages, those of the tree filled with patterns.

    Parameters
    ----------
    pool : tokens.
    options : more of the server's.
    """
    os.environ[STRICT] = "1"
    with tempfile.TemporaryDirectory() as folder:
        server = InProcessScheduler(
            make_server_args(
                write_tiny_model(Path(folder), ONE_LAYER),
                compress=True,
                chunked_prefill_size=256,
                max_total_tokens=pool,
                max_running_requests=12,
                kv_compress_min_budget=48,
                **options,
            )
        )
        audit = PageAudit(server)
        audit.shared.fill = True
        yield server, audit
