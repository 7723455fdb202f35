"""Per-request options from a program of SGLang's frontend language.

``sgl.gen`` has no argument for ``custom_params``; an endpoint of this kind sends the
same settings with every call of the programs that run on it::

    sgl.set_default_backend(KVCompressEndpoint("http://127.0.0.1:30000", rate=8))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sglang as sgl
from sglang.lang.ir import SglSamplingParams


@dataclass
class Params(SglSamplingParams):
    """Sampling parameters of an sgl.gen, with what sgl.gen has no argument for."""

    custom_params: dict[str, Any] | None = None

    def to_srt_kwargs(self) -> dict[str, Any]:
        """The request's "sampling_params"."""
        return {**super().to_srt_kwargs(), "custom_params": self.custom_params}


class KVCompressEndpoint(sgl.RuntimeEndpoint):
    """A server whose programs use their own settings, for example ``budget=1024``."""

    def __init__(self, base_url: str, **settings: Any) -> None:
        super().__init__(base_url)
        self.custom_params = {"kv_compress": settings}

    def generate(self, s: Any, sampling_params: SglSamplingParams) -> Any:
        """Answer an sgl.gen."""
        params = Params(**vars(sampling_params), custom_params=self.custom_params)
        return super().generate(s, params)

    def generate_stream(self, s: Any, sampling_params: SglSamplingParams) -> Any:
        """Answer an sgl.gen of a program that runs with stream=True."""
        params = Params(**vars(sampling_params), custom_params=self.custom_params)
        return super().generate_stream(s, params)
