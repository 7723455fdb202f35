"""Which device will be used, and with which kernels."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_kvc.tools.doctor.findings import BAD, GOOD, NOTE, Finding
from sglang_kvc.tools.doctor.installed import PACKAGES, version_of

_NEEDS = {"FlashAttention-3": "SGLang's kernels", "FlashInfer": "FlashInfer"}
"""Package of a prefill kernel; torch has its own."""


def device() -> Iterator[Finding]:
    """The device, prefill's kernels, decode's."""
    import torch

    from sglang_kvc.attention.prefill_kernels import prefill_device
    from sglang_kvc.upstream.compat import no_accelerator

    on_gpu = not no_accelerator()
    if on_gpu and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        count = torch.cuda.device_count()
        several = f", the first of {count}" if count > 1 else ""
        found = f"{torch.cuda.get_device_name()}, sm_{major}{minor}{several}"
        yield Finding("device", GOOD, found)
    elif on_gpu:
        yield Finding("device", BAD, "an accelerator that CUDA does not see")
        return
    else:
        found = "no GPU: the CPU, which is for trying things out"
        yield Finding("device", NOTE, found)
    kernels = prefill_device(on_gpu)
    yield _prefill(kernels.whole)
    yield Finding("prompts over the pool", GOOD, kernels.packed)
    decode = "our Triton kernel" if on_gpu else "the reference, plain torch"
    yield Finding("decode", GOOD, decode)


def _prefill(kernel: str) -> Finding:
    package = _NEEDS.get(kernel)
    if package and version_of(*PACKAGES[package]) is None:
        return Finding("prefill", BAD, f"{kernel}, but {package} is not installed")
    return Finding("prefill", GOOD, kernel)
