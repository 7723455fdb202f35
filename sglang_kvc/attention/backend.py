"""SGLang's attention contract: stock prefill, our decode kernel, our KV writes.

Per layer and step:

* extend: `append_kv` writes K and V to the arena and the query to the ring, then stock
  attention (`prefill_kernels.py`), with a plan that is made once a forward;
* decode: `decode_attention` writes the same and attends over packed blocks and tail, in
  one kernel (`kernels/`).

The eviction passes do not run here but behind the whole forward, because a pass
selects jointly over all layers (`step.run_step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention import base_attn_backend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_kvc.attention.kv_scales import layer_scales
from sglang_kvc.attention.prefill import PrefillKernel
from sglang_kvc.attention.prefill_kernels import prefill_kernels
from sglang_kvc.attention.step_context import folds_of_forward
from sglang_kvc.config.server_args import chunk_tokens, options_of
from sglang_kvc.errors import UnsupportedModeError
from sglang_kvc.kernels.append import append_kv
from sglang_kvc.kernels.decode_attention import (
    DecodeWorkspace,
    NewTokens,
    decode_attention,
    make_decode_workspace,
    plan_decode,
)
from sglang_kvc.memory.agreement import agreed_chunk
from sglang_kvc.memory.device_state import make_device_state
from sglang_kvc.memory.kv_pool import KVScales
from sglang_kvc.runtime import KVCompressRuntime
from sglang_kvc.upstream.generation import UPSTREAM

if TYPE_CHECKING:
    from sglang_kvc.config.options import KVCompressOptions


def build(model_runner: Any) -> KVCompressAttentionBackend:
    """Factory for ``--attention-backend kvcompress``, in the scheduler process.

    Everything that must hold is checked by `plugin.build_attention_backend`, which
    calls this; an exception there stops the server.
    """
    options = options_of(model_runner.server_args)
    if options is None:
        raise UnsupportedModeError(
            "attention backend 'kvcompress' was asked for without --kv-compress; "
            "start the server with --kv-compress and leave --attention-backend out"
        )
    return KVCompressAttentionBackend(model_runner, options)


@dataclass(frozen=True, eq=False)
class ExtendMetadata:
    """Plan of one prefill forward: what its layers need besides its batch.

    Attributes
    ----------
    kernel : the attention that this batch needs.
    plan : its plan; it keeps alive what the launched kernels read.
    ring_rows : where the queries go, see `_ring_rows`.
    """

    kernel: PrefillKernel[Any]
    plan: Any
    ring_rows: torch.Tensor


class KVCompressAttentionBackend(base_attn_backend.AttentionBackend):
    """Attention over the arena.

    Parameters
    ----------
    model_runner : SGLang's ModelRunner with its pools built.
    options : the server's options.

    Attributes
    ----------
    forward_metadata : of the last forward if that was a prefill, else None. Planned
        before a forward and read by its layers; the name is SGLang's.
    kernels : prefill attention of this device.
    runtime : the parts of this server.
    """

    def __init__(self, model_runner: Any, options: KVCompressOptions) -> None:
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.forward_metadata: ExtendMetadata | None = None
        sm_scale = _check_layers(model_runner.model)
        self.token_to_kv_pool.set_scales(_layer_scales(model_runner.model))
        state = make_device_state(model_runner, options)
        self.kernels = prefill_kernels(self.token_to_kv_pool, state.tables)
        settings = UPSTREAM.resolved(model_runner.server_args)
        chunk_size = chunk_tokens(settings)
        self.runtime = KVCompressRuntime(
            self.token_to_kv_pool,
            state,
            sm_scale,
            chunk_size=agreed_chunk(state, chunk_size),
        )
        self._workspace: DecodeWorkspace | None = None
        if state.on_gpu:
            self._workspace = make_decode_workspace(
                self.req_to_token_pool.size,
                state.shape.num_qo_heads,
                state.shape.head_dim,
                self.token_to_kv_pool.device,
                num_kv_heads=state.shape.num_kv_heads,
                num_layers=state.shape.num_layers,
            )
        self.runtime.warm_up()

    # Metadata ----------------------------------------------------------------------

    def init_forward_metadata_out_graph(
        self, forward_batch: Any, in_capture: bool = False
    ) -> None:
        """Plan a prefill; decode needs nothing that a graph could not record."""
        del in_capture
        mode = forward_batch.forward_mode
        self.forward_metadata = None
        if mode.is_decode() or mode.is_idle():
            return
        if not mode.is_extend() or mode.is_mixed() or mode.is_target_verify():
            raise UnsupportedModeError(
                f"--kv-compress does not support forward mode {mode.name}"
            )
        folds = folds_of_forward()
        kernel = self.kernels.of(folds)
        self.forward_metadata = ExtendMetadata(
            kernel=kernel,
            plan=kernel.plan(forward_batch, folds),
            ring_rows=_ring_rows(forward_batch, self.runtime.state.query_ring.window),
        )

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Plan how the decode kernel splits its work."""
        if not forward_batch.forward_mode.is_decode() or self._workspace is None:
            return
        plan_decode(
            self.runtime.state.tables,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            self._workspace,
            num_kv_heads=self.runtime.state.shape.num_kv_heads,
            query_ring=self.runtime.state.query_ring,
        )

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Do nothing: the decode kernel reads the live tables by slot."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padding rows: they attend to one token of the padding page."""
        return 1

    def shared_read_ends(self, fm: Any) -> Any:
        """Tell SGLang when it may change the request table; asked from 0.5.18 on.

        Decode reads it in every layer, so no sooner than behind the graph. Prefill, and
        what the runner does not know, holds it for the whole step. So does a pass,
        which comes later still: see `Generation.wait_for_step`.
        """
        ends = base_attn_backend.SharedReadEnds
        return ends.POST_REPLAY if fm.is_decode() else ends.UNKNOWN

    # Attention ---------------------------------------------------------------------

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write the new KVs, then stock causal attention; [num_tokens, Hq * D]."""
        _check_call(k, save_kv_cache, kwargs)
        metadata = self.forward_metadata
        assert metadata is not None
        query, key, value = _split_heads(q, k, v, layer)
        append_kv(
            self.runtime.state.arena,
            key,
            value,
            query,
            forward_batch.out_cache_loc,
            self.runtime.state.query_ring,
            metadata.ring_rows,
            layer=self._arena_layer(layer),
        )
        out = metadata.kernel.run(metadata.plan, query, layer)
        return out.reshape(q.shape[0], -1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write the new KV, then attend over packed blocks and tail; [bs, Hq * D]."""
        _check_call(k, save_kv_cache, kwargs)
        query, key, value = _split_heads(q, k, v, layer)
        out = decode_attention(
            self.runtime.state.arena,
            self.runtime.state.tables,
            query,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            layer=self._arena_layer(layer),
            sm_scale=layer.scaling,
            workspace=self._workspace,
            new_tokens=NewTokens(
                key, value, forward_batch.out_cache_loc, self.runtime.state.query_ring
            ),
        )
        return out.reshape(q.shape[0], -1)

    def _arena_layer(self, layer: RadixAttention) -> int:
        index: int = layer.layer_id - self.token_to_kv_pool.start_layer
        return index


def _ring_rows(batch: Any, window: int) -> torch.Tensor:
    """Row of the query ring for every new token, int64 [num_tokens].

    It is slot * w + p % w, or -1 if place p is too old to be kept.

    Parameters
    ----------
    batch : ForwardBatch in extend mode.
    window : w, queries that the ring holds of a request.
    """
    new_lens, total = batch.extend_seq_lens, batch.positions.shape[0]

    def each_token(of_request: torch.Tensor) -> torch.Tensor:
        return of_request.repeat_interleave(new_lens, output_size=total)

    slots = each_token(batch.req_pool_indices.long())
    ends = each_token(batch.seq_lens)
    # Not the rotary positions, which run ahead in a probe.
    places = torch.arange(total, device=slots.device)
    places += each_token(batch.extend_prefix_lens - batch.extend_start_loc)
    index = slots * window + places % window
    return torch.where(places >= ends - window, index, -1)


def _split_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of shape [num_tokens, heads, head_dim]."""
    return (
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
    )


def _check_call(k: Any, save_kv_cache: bool, extra: dict[str, Any]) -> None:
    """Refuse what a model may ask of attention and we do not do."""
    if not save_kv_cache or k is None:
        raise UnsupportedModeError(
            "the model wrote KV itself or shares KV between layers "
            "(save_kv_cache=False); --kv-compress must write every KV"
        )
    unknown = sorted(name for name, value in extra.items() if value is not None)
    if unknown:
        raise UnsupportedModeError(
            f"the model passes {', '.join(unknown)} to attention; "
            "--kv-compress does not support it"
        )


def _layer_scales(model: torch.nn.Module) -> dict[int, KVScales]:
    """Scales of an e4m3 cache by layer."""
    layers = (layer for layer in model.modules() if isinstance(layer, RadixAttention))
    return {layer.layer_id: layer_scales(layer) for layer in layers}


def _check_layers(model: torch.nn.Module) -> float:
    """Refuse attention layers we cannot serve; returns the common softmax scale."""
    scales = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        problems = {
            "sliding window attention": (layer.sliding_window_size or -1) > 0,
            "cross attention": layer.is_cross_attention,
            f"attention type {layer.attn_type}": layer.attn_type
            != AttentionType.DECODER,
            "logit soft-capping": bool(layer.logit_cap),
            "different key and value head sizes": layer.qk_head_dim != layer.v_head_dim,
        }
        for feature, present in problems.items():
            if present:
                raise UnsupportedModeError(
                    f"--kv-compress does not support {feature} (layer {name})"
                )
        scales.add(float(layer.scaling))
    if len(scales) != 1:
        raise UnsupportedModeError(
            "--kv-compress needs one softmax scale for all attention layers, "
            f"got {sorted(scales)}"
        )
    return scales.pop()
