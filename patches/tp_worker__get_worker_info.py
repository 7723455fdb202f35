"""Let a request be longer than the pool."""

from __future__ import annotations

from typing import Any

from sglang_kvc.patches.runtimes import of_worker
from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.managers.tp_worker:TpModelWorker.get_worker_info",
    hook_type=HookType.AROUND,
    expected_params=("self",),
    reason=(
        "SGLang refuses what is longer than the pool; a request that is compressed "
        "between chunks, or while it decodes, need not fit. What cannot be served is "
        "refused by its request."
    ),
    upstream_link="managers/tp_worker.py:550",
    remove_when="The limit on a request's length asks the cache.",
    runtime_from=of_worker,
)

# Distance that SGLang keeps between its limits on a request and on its prompt.
RESERVED = 5


def hook(original: Any, runtime: Any, worker: Any) -> Any:
    """Raise max_req_len and max_req_input_len to the context length."""
    del runtime
    info = original(worker)
    longest = worker.model_config.context_len - 1
    return (*info[:4], longest, longest - RESERVED, *info[6:])
