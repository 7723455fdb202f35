"""The one table of what we touch of SGLang and cannot be read from our own source.

Members that ``sglang_kvc/upstream/types.py`` declares are read from there, beside those
that stand here. A class must stand in `HOMES` in any case, which says where SGLang has
it. What exists in neither of two releases is left alone, so members of an older
generation may stay.
"""

from __future__ import annotations

_SRT = "sglang.srt."

HOMES = {
    name: f"{_SRT}{module}:{name}"
    for name, module in (
        ("Req", "managers.schedule_batch"),
        ("ReqKvInfo", "managers.schedule_batch"),
        ("ScheduleBatch", "managers.schedule_batch"),
        ("Scheduler", "managers.scheduler"),
        ("SchedulerRequestReceiver", "managers.scheduler_components.request_receiver"),
        ("PrefillAdder", "managers.schedule_policy"),
        ("TpModelWorker", "managers.tp_worker"),
        ("TokenizerManager", "managers.tokenizer_manager"),
        ("ReqState", "managers.tokenizer_manager"),
        (
            "SchedulerInvariantChecker",
            "managers.scheduler_components.invariant_checker",
        ),
        ("GenerateReqInput", "managers.io_struct"),
        ("SamplingParams", "sampling.sampling_params"),
        ("ModelRunner", "model_executor.model_runner"),
        ("ForwardBatch", "model_executor.forward_batch_info"),
        ("RadixAttention", "layers.radix_attention"),
        ("AttentionBackend", "layers.attention.base_attn_backend"),
        ("KVCacheConfigurator", "mem_cache.kv_cache_configurator"),
        ("KVCache", "mem_cache.memory_pool"),
        ("ReqToTokenPool", "mem_cache.memory_pool"),
        ("PagedTokenToKVPoolAllocator", "mem_cache.allocator.paged"),
        ("RadixCache", "mem_cache.radix_cache"),
        ("UnifiedRadixCache", "mem_cache.unified_radix_cache"),
        ("RadixKey", "mem_cache.radix_cache"),
        ("InsertParams", "mem_cache.base_prefix_cache"),
        ("InsertResult", "mem_cache.base_prefix_cache"),
        ("MatchResult", "mem_cache.base_prefix_cache"),
        ("TreeCacheBuildContext", "mem_cache.registry"),
        ("ModelConfig", "configs.model_config"),
        ("ServerArgs", "server_args"),
    )
}
"""Classes of SGLang, by the name that `MEMBERS` and our types give them."""

MEMBERS = {
    "Req": (
        "kv kv_committed_len req_pool_idx cache_protected_len prefix_indices "
        "extend_range set_extend_range last_node full_untruncated_fill_ids "
        "init_next_round_input origin_input_ids output_ids sampling_params "
        "finished_reason to_finish extra_key customized_info rid priority lora_id "
        "input_embeds positional_embed_overrides logprob_start_len time_stats "
        "skip_radix_cache_insert finished"
    ),
    "ReqKvInfo": "kv_allocated_len",
    "ScheduleBatch": (
        "batch_is_full device forward_mode init_new input_ids prefill_input_ids_cpu "
        "prepare_for_extend req_pool_indices_cpu reqs seq_lens_cpu "
        "token_to_kv_pool_allocator tree_cache"
    ),
    "Scheduler": (
        "_add_request_to_queue chunked_prefill_size enable_overlap forward_stream "
        "ipc_channels last_batch max_new_tokens_limit max_req_input_len max_req_len "
        "model_config req_to_token_pool running_batch server_args spec_algorithm "
        "token_to_kv_pool_allocator tp_worker tree_cache waiting_queue "
        # The tests build and drive a scheduler by this and the next one.
        "__init__"
    ),
    "SchedulerRequestReceiver": "recv_requests",
    "PrefillAdder": (
        "_get_running_request_total_token_offset budget_state can_run_list "
        "preempt_list rem_chunk_tokens rem_total_token_offset rem_total_tokens "
        "running_batch token_to_kv_pool_allocator tree_cache"
    ),
    "TpModelWorker": "model_config model_runner war_fastpath_runner",
    # The summary of a request gets into its meta_info in the last.
    "TokenizerManager": "rid_to_state server_args _handle_batch_output",
    "ReqState": "customized_info_accumulated",
    "SchedulerInvariantChecker": "get_last_batch get_running_batch tree_cache",
    "SamplingParams": "custom_params ignore_eos max_new_tokens min_new_tokens",
    "ModelRunner": (
        "forward model model_config req_to_token_pool sample server_args "
        "token_to_kv_pool token_to_kv_pool_allocator war_fastpath_read_done_event"
    ),
    "ForwardBatch": (
        "extend_prefix_lens extend_seq_lens extend_seq_lens_cpu extend_start_loc "
        "forward_mode init_new num_token_non_padded_cpu out_cache_loc positions "
        "req_pool_indices seq_lens seq_lens_cpu"
    ),
    "RadixAttention": (
        "attn_type head_dim is_cross_attention k_scale k_scale_float layer_id "
        "logit_cap qk_head_dim scaling sliding_window_size tp_k_head_num "
        "tp_q_head_num tp_v_head_num v_head_dim v_scale v_scale_float"
    ),
    "KVCacheConfigurator": (
        "device kv_cache_dtype layer_info model_config server_args sliding_window_size"
    ),
    "KVCache": "_finalize_allocation_log",
    # A slot must not be handed out while its old owner is decoded.
    "ReqToTokenPool": "alloc free req_to_token",
    "PagedTokenToKVPoolAllocator": (
        "alloc alloc_decode alloc_extend available_size free free_group_begin "
        "free_group_end free_pages free_segment get_kvcache size"
    ),
    "RadixCache": (
        "dec_lock_ref disable evictable_size insert match_prefix req_to_token_pool "
        "root_node token_to_kv_pool_allocator"
    ),
    # What frees second copies, and who holds a prefix.
    "UnifiedRadixCache": (
        "checkpoint disable evictable_size free_kv_row insert lock on_release "
        "path_device_indices root_node_handle unlock"
    ),
    "InsertResult": "prefix_len",
    "MatchResult": "device_indices",
    "TreeCacheBuildContext": "params",
    # All settings are resolved while the object is constructed.
    "ServerArgs": "__post_init__ get_model_config",
}
"""Members that we read, set, call or lean on, by class."""

SYMBOLS = (
    f"{_SRT}plugins:load_plugins",
    # Whether a hook is active is read from the closure that this one makes.
    f"{_SRT}plugins.hook_registry:_wrap_fn",
    f"{_SRT}utils.common:is_cuda",
    f"{_SRT}utils.common:is_hip",
    f"{_SRT}managers.schedule_policy:CLIP_MAX_NEW_TOKENS",
    f"{_SRT}managers.schedule_policy:AddReqResult.NO_TOKEN",
    f"{_SRT}managers.schedule_policy:AddReqResult.OTHER",
    # Who gives back the memory of a request, and when.
    f"{_SRT}mem_cache.common:release_kv_cache",
    f"{_SRT}mem_cache.registry:default_radix_cache_factory",
)
"""Symbols without a hook, beside `SEAMS` and what our source imports by name."""

NEW_FIELDS = {
    "server setting": "ServerArgs",
    "sampling parameter": "SamplingParams",
    "request field": "GenerateReqInput",
    "model property": "ModelConfig",
}
"""Classes whose new fields may be something to refuse."""

PINS = (
    "python",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "xgrammar",
    "numpy",
    "msgspec",
    "gguf",
    "sglang-kernel",
    "flashinfer-python",
    "apache-tvm-ffi",
    "nvidia-cutlass-dsl",
)
"""Requirements that our code meets; others are only counted."""
