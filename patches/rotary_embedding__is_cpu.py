"""Let rotary embeddings be built on machines without an accelerator."""

from __future__ import annotations

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.layers.rotary_embedding.base:_is_cpu",
    hook_type=HookType.ATTRIBUTE,
    expected_params=None,
    reason=(
        "Without an accelerator the constructor imports `vllm._custom_ops`, unless "
        "SGLANG_USE_CPU_ENGINE=1, which needs kernels that CUDA wheels lack. The flag "
        "is read in that constructor only and selects the plain torch path."
    ),
    upstream_link="layers/rotary_embedding/base.py:39",
    remove_when="the constructor no longer imports vllm on a CPU.",
)


def hook(previous: bool) -> bool:
    """True on a machine without an accelerator, else unchanged."""
    from sglang_kvc.upstream.compat import no_accelerator

    return previous or no_accelerator()
