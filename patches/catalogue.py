"""Names of all patch files, in two groups.

``PARENT`` files are imported when the plugin is loaded, in every process, so they
import nothing heavy at their top: the rest of ``sglang_kvc`` inside the hook.
``SCHEDULER`` files are imported right after ``sglang.srt.managers.scheduler``, in the
processes that have loaded it, and may import what they like.

To add a patch, write ``patches/<name>.py`` and add its name to one of the groups.
"""

from __future__ import annotations

PARENT = (
    # Arguments.
    "server_args__add_cli_args",
    "server_args__from_cli_args",
    "server_args__check_server_args",
    "engine__server_args_class",
    "engine__launch_subprocesses",
    # Machines without an accelerator.
    "utils_common__support_triton",
    "rotary_embedding__is_cpu",
    "pynccl__init",
    # Requests and answers.
    "http_server__app",
    "api_contract__generate_contract_error",
    "serving_base__handle_request",
    "serving_responses__create_responses",
    "tokenizer_manager__generate_request",
    "tokenizer_manager__validate_one_request",
    "tokenizer_manager__init_req_state",
    "tokenizer_manager__accumulate_request_meta_info",
)

SCHEDULER = (
    # Pools.
    "kv_cache_configurator__configure",
    "kv_cache_configurator__profile_available_bytes",
    "kv_cache_configurator__resolve_max_num_reqs",
    "kv_cache_configurator__build_mha_kv_pool",
    "kv_cache_configurator__build_token_to_kv_pool_allocator",
    "models_utils__enable_fused_set_kv_buffer",
    # Admission.
    "tp_worker__get_worker_info",
    "scheduler__init_req_max_new_tokens",
    "scheduler__add_request_to_queue",
    "schedule_batch__compute_max_prefix_len",
    "schedule_policy__running_request_offset",
    "schedule_policy__add_one_req",
    "schedule_policy__add_chunked_req",
    "schedule_policy__preempt_to_schedule",
    "scheduler__get_prefill_adder_class",
    "scheduler__get_new_batch_prefill",
    "scheduler__get_new_batch_prefill_raw",
    "scheduler__should_defer_prefill",
    # Out of memory.
    "schedule_batch__retract_decode",
    "schedule_batch__get_decode_retraction_order",
    # Structured output without an accelerator.
    "xgrammar_backend__allocate_token_bitmask",
    "xgrammar_backend__apply_vocab_mask",
    # Start-up.
    "scheduler__init_metrics_reporter",
    "scheduler__get_init_info",
    # One step.
    "schedule_batch__prepare_for_extend",
    "schedule_batch__prepare_for_decode",
    "tp_worker__forward_batch_generation",
    "scheduler__get_next_batch_to_run",
    "scheduler__process_batch_result",
    "invariant_checker__get_total_uncached_sizes",
    # What /metrics shows.
    "metrics_collector__log_stats",
)
