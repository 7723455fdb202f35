"""Let structured output ask for ordinary memory on machines without an accelerator."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.constrained.xgrammar_backend:_allocate_token_bitmask",
    hook_type=HookType.AROUND,
    expected_params=("vocab_size", "batch_size"),
    reason=(
        "SGLang asks for pinned memory whatever the device: without a GPU the first "
        "request with a JSON schema or a regex ends the scheduler with 'Found no "
        "NVIDIA driver'. Machines with a GPU are not affected."
    ),
    upstream_link="constrained/xgrammar_backend.py:66",
    remove_when="the bitmask asks the device, as the tensors of sampling do.",
)


def hook(original: Any, vocab_size: int, batch_size: int) -> Any:
    """Allocate xgrammar's own bitmask on a CPU, else SGLang's."""
    from sglang_kvc.upstream.compat import no_accelerator

    if no_accelerator():
        import xgrammar

        return xgrammar.allocate_token_bitmask(batch_size, vocab_size)
    return original(vocab_size, batch_size)
