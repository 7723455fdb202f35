"""Let several ranks start on machines without an accelerator."""

from __future__ import annotations

from typing import Any

from sglang_kvc.upstream.patch import HookType, Patch

_PARAMS = ("self", "group", "device", "library_path", "is_symmetric_memory_enabled")

PATCH = Patch(
    target=(
        "sglang.srt.distributed.device_communicators.pynccl:PyNcclCommunicator.__init__"
    ),
    hook_type=HookType.AROUND,
    expected_params={"0.5.17": _PARAMS, "0.5.23": (*_PARAMS, "cta_policy")},
    reason=(
        "With --tp-size 2 --device cpu SGLang starts NCCL, because the library is "
        "installed, and that asks for a CUDA device. The ranks have Gloo; a "
        "communicator that is not available is left alone."
    ),
    upstream_link="distributed/device_communicators/pynccl.py:32",
    remove_when="`GroupCoordinator` starts NCCL for devices that have it only.",
)


def hook(
    original: Any, communicator: Any, group: Any, device: Any, *args: Any, **kwargs: Any
) -> Any:
    """Say that there is no NCCL on a CPU, else start it."""
    if not str(device).startswith("cpu"):
        return original(communicator, group, device, *args, **kwargs)
    communicator.group, communicator.device = group, device
    communicator.available, communicator.disabled = False, True
    return None
