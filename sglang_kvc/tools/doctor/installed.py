"""Which packages are installed, and whether SGLang will find the plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.doctor.findings import BAD, GOOD, NOTE, Finding
from sglang_kvc.upstream.compat import check_sglang_version, sglang_version

GROUP, NAME = "sglang.srt.plugins", "kvcompress"
PACKAGES = {
    "torch": ("torch",),
    "Triton": ("triton",),
    "FlashInfer": ("flashinfer-python",),
    # Renamed between releases.
    "SGLang's kernels": ("sglang-kernel", "sgl-kernel"),
}
_VARIABLE = "SGLANG_PLUGINS"


def version_of(*names: str) -> str | None:
    """Version of the first of these packages that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def installed() -> Iterator[Finding]:
    """Versions, and whether they are supported."""
    yield _sglang()
    for title, names in PACKAGES.items():
        version = version_of(*names)
        yield Finding(title, GOOD if version else NOTE, version or "not installed")
    yield _plugin()


def _sglang() -> Finding:
    try:
        check_sglang_version()
    except KVCError as error:
        return Finding("SGLang", BAD, str(error))
    return Finding("SGLang", GOOD, f"{sglang_version()}, supported")


def _plugin() -> Finding:
    version = version_of("sglang_kvc")
    found = {point.name: point.value for point in metadata.entry_points(group=GROUP)}
    if NAME not in found:
        return Finding(
            "plugin",
            BAD,
            f"no entry point {NAME} in {GROUP}: SGLang would not know --kv-compress. "
            "Install the package (pip install -e .); a path alone is too little",
        )
    wanted = os.environ.get(_VARIABLE)
    names = [name.strip() for name in wanted.split(",")] if wanted else [NAME]
    if NAME not in names:
        return Finding("plugin", BAD, f"{_VARIABLE}={wanted} leaves {NAME} out: add it")
    return Finding("plugin", GOOD, f"sglang_kvc {version}, registered as {NAME}")
