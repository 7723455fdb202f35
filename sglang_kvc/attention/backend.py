"""SGLang's attention contract: stock prefill, our decode kernel, our KV writes.

Per layer and step:

* extend: `append_kv` writes K and V to the arena and the query to the ring, then stock
  attention over the page view (`prefill.py`);
* decode: `decode_attention` writes the same and attends over packed blocks and tail, in
  one kernel (`kernels/`).

The eviction passes do not run here but behind the whole forward, because a pass
selects jointly over all layers (`scheduling.run_step`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_kvc.attention.prefill import PrefillAttention, build_prefill
from sglang_kvc.attention.prefill_folded import (
    build_folded_prefill,
    can_prefill_folded,
)
from sglang_kvc.config.server_args import options_of
from sglang_kvc.errors import UnsupportedModeError
from sglang_kvc.kernels.append import append_kv
from sglang_kvc.kernels.decode_attention import (
    DecodeWorkspace,
    NewTokens,
    decode_attention,
    make_decode_workspace,
    plan_decode,
)
from sglang_kvc.runtime import KVCompressRuntime

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


class KVCompressAttentionBackend(AttentionBackend):
    """Attention over the arena.

    Parameters
    ----------
    model_runner : SGLang's ModelRunner with its pools built.
    options : the server's options.
    """

    def __init__(self, model_runner: Any, options: KVCompressOptions) -> None:
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.forward_metadata: Any = None
        self.window = options.window
        sm_scale = _check_layers(model_runner.model)
        self.runtime = KVCompressRuntime(
            model_runner,
            options,
            sm_scale,
            folds=can_prefill_folded(model_runner.token_to_kv_pool),
        )
        req_to_token = self.req_to_token_pool.req_to_token
        self._whole = build_prefill(self.token_to_kv_pool, req_to_token)
        self._folded = build_folded_prefill(
            self.token_to_kv_pool, req_to_token, self.runtime.state.tables
        )
        self.prefill: PrefillAttention = self._whole
        self._workspace: DecodeWorkspace | None = None
        if self.runtime.state.on_gpu:
            self._workspace = make_decode_workspace(
                self.req_to_token_pool.size,
                self.runtime.state.shape.num_qo_heads,
                self.runtime.state.shape.head_dim,
                self.token_to_kv_pool.device,
                num_kv_heads=self.runtime.state.shape.num_kv_heads,
                num_layers=self.runtime.state.shape.num_layers,
            )
        self.runtime.log_memory()
        self.runtime.warm_up()

    # Metadata ----------------------------------------------------------------------

    def init_forward_metadata_out_graph(
        self, forward_batch: Any, in_capture: bool = False
    ) -> None:
        """Host-side preparation; decode needs none."""
        del in_capture
        mode = forward_batch.forward_mode
        if mode.is_decode() or mode.is_idle():
            return
        if not mode.is_extend() or mode.is_mixed() or mode.is_target_verify():
            raise UnsupportedModeError(
                f"--kv-compress does not support forward mode {mode.name}"
            )
        folds = self.runtime.prefill_folds
        self.prefill = self._folded if folds and self._folded else self._whole
        self.prefill.plan(forward_batch, folds)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """How the decode kernel splits its work; in extend, where queries go.

        The ring row is slot * w + p % w, or -1 if place p is too old to be kept.
        """
        if forward_batch.forward_mode.is_idle():
            return
        if forward_batch.forward_mode.is_decode():
            if self._workspace is not None:
                plan_decode(
                    self.runtime.state.tables,
                    forward_batch.req_pool_indices,
                    forward_batch.seq_lens,
                    self.runtime.state.shape.num_layers,
                    self.runtime.state.shape.num_kv_heads,
                    self._workspace,
                )
            return
        slots = forward_batch.req_pool_indices.long()
        new_lens = forward_batch.extend_seq_lens
        total = forward_batch.positions.shape[0]
        slots = slots.repeat_interleave(new_lens, output_size=total)
        ends = forward_batch.seq_lens.repeat_interleave(new_lens, output_size=total)
        # Not the rotary positions, which run ahead in a probe.
        shift = forward_batch.extend_prefix_lens - forward_batch.extend_start_loc
        places = torch.arange(total, device=slots.device)
        places += shift.repeat_interleave(new_lens, output_size=total)
        index = slots * self.window + places % self.window
        recorded = places >= ends - self.window
        self._ring_index = torch.where(recorded, index, -1)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to allocate: the decode kernel reads the live tables by slot."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padding rows attend to one token of the padding page."""
        return 1

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
        query, key, value = _split_heads(q, k, v, layer)
        append_kv(
            key,
            value,
            query,
            self.runtime.state.arena,
            self._arena_layer(layer),
            forward_batch.out_cache_loc,
            self.runtime.state.query_ring,
            self._ring_index,
        )
        return self.prefill.run(query, layer).reshape(q.shape[0], -1)

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
            query,
            self.runtime.state.arena,
            self._arena_layer(layer),
            self.runtime.state.tables,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            layer.scaling,
            workspace=self._workspace,
            query_lse=self.runtime.state.query_lse,
            new_tokens=NewTokens(
                key, value, forward_batch.out_cache_loc, self.runtime.state.query_ring
            ),
        )
        return out.reshape(q.shape[0], -1)

    def _arena_layer(self, layer: RadixAttention) -> int:
        index: int = layer.layer_id - self.token_to_kv_pool.start_layer
        return index


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
