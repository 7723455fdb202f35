"""Keep SGLang's Triton helpers off machines without an accelerator."""

from __future__ import annotations

from collections.abc import Callable

from sglang_kvc.upstream.patch import HookType, Patch

PATCH = Patch(
    target="sglang.srt.utils.common:support_triton",
    hook_type=HookType.AROUND,
    expected_params=("backend",),
    reason=(
        "SGLang decides by the name of the attention backend whether to launch Triton "
        "kernels; on a CPU, with our name, the first prefill dies with '0 active "
        "drivers'. Other backends and machines with a GPU are not affected."
    ),
    upstream_link="utils/common.py:1304",
    remove_when="`support_triton` asks the device.",
    # Then it asks the platform.
    until="0.5.22",
)


def hook(original: Callable[[str], bool], backend: str) -> bool:
    """Say no for our backend on a CPU, else what SGLang says."""
    from sglang_kvc.config.options import BACKEND
    from sglang_kvc.upstream.compat import no_accelerator

    if backend == BACKEND and no_accelerator():
        return False
    return original(backend)
