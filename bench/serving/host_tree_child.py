"""One real scheduler without a model in a process of its own; `host_tree` drives it.

SGLang's scheduler, its event loop with overlap, allocator, request table and prefix
tree are its own. Replaced are the forward and the sampling, which answer at once, the
receiver, and the sending of outputs. So what is left of a step is host time.

Commands, one JSON line each (``op``): ``steps`` runs some and answers their times,
``quit`` ends the child.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.serving.host_tree_load import VOCAB, Shape, arrivals, message

PLAIN = "bench_plain_radix"
"""Name under which SGLang's plain RadixCache is registered."""
NEVER_SECONDS = 100_000
WATCHED = (
    "match_prefix",
    "touch_prefix",
    "checkpoint",
    "insert",
    "lock",
    "unlock",
    "free_kv_row",
    "on_release",
    "evict",
    "evict_for_alloc",
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def main() -> None:
    """The child: build the scheduler, then serve commands between its steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", required=True, help="JSON: tree, compress, rate")
    parser.add_argument("--shape", required=True, help="JSON, fields of Shape")
    parser.add_argument("--answer-fd", type=int, required=True)
    args = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    answers = os.fdopen(args.answer_fd, "w", buffering=1)
    system, shape = json.loads(args.system), Shape(**json.loads(args.shape))
    started = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        scheduler = build_scheduler(folder, system, shape)
    feed = Feed(scheduler, system, shape, answers)
    tree = scheduler.tree_cache
    feed.answer(
        {
            "ready_s": time.perf_counter() - started,
            "tree": type(tree).__name__,
            "core": type(getattr(tree, "tree_core", None)).__name__,
        }
    )
    scheduler.request_receiver = feed
    with torch.no_grad():
        scheduler.event_loop_overlap()


def build_scheduler(model: str, system: dict[str, Any], shape: Shape) -> Any:
    """SGLang's scheduler on the CPU, with the system's tree and no model behind it."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache import radix_cache, registry
    from sglang.srt.server_args import PortArgs, ServerArgs

    registry.register_radix_cache_backend(
        PLAIN, lambda context: radix_cache.RadixCache(context.params)
    )
    keywords: dict[str, Any] = {
        "model_path": model,
        "load_format": "dummy",
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "chunked_prefill_size": 8192,
        "max_prefill_tokens": 16384,
        "max_running_requests": shape.running,
        "max_total_tokens": shape.pool,
        "context_length": shape.context,
        "page_size": shape.page,
        "watchdog_timeout": NEVER_SECONDS,
    }
    if system["compress"]:
        from sglang_kvc.config.server_args import build_server_args

        args = build_server_args(kv_compress=True, **keywords)
    else:
        tree = PLAIN if system["tree"] == "plain" else None
        args = ServerArgs(
            attention_backend="torch_native", radix_cache_backend=tree, **keywords
        )
    ports = PortArgs.init_new(args)
    ranks = runtime_context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    runtime_context.publish(args, role="scheduler", ranks=ranks)
    scheduler = Scheduler(args, ports)
    replace_device_work(scheduler)
    return scheduler


def replace_device_work(scheduler: Any) -> None:
    """Make the forward and the sampling answer at once; outputs go nowhere."""
    import torch
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    runner = scheduler.tp_worker.model_runner
    tokens = torch.randint(10, VOCAB, (4096,))
    output = ModelRunnerOutput(
        logits_output=LogitsProcessorOutput(next_token_logits=None),
        can_run_graph=False,
    )
    runner.forward = lambda *args, **keywords: output
    runner.sample = lambda logits, batch: tokens[: batch.batch_size].clone()
    channels = scheduler.ipc_channels
    for sender in (channels.send_to_tokenizer, channels.send_to_detokenizer):
        sender.send_output = lambda *args, **keywords: None
    # On the CPU there is one stream.
    scheduler.schedule_stream = scheduler.device_module.Stream(priority=0)
    scheduler.schedule_stream.synchronize = lambda: None
    scheduler._war_barrier_enabled = False
    scheduler.enable_overlap = scheduler.tp_worker.enable_overlap = True
    object.__setattr__(scheduler.batch_result_processor, "enable_overlap", True)
    if not hasattr(scheduler, "batch_record_buf"):
        scheduler.batch_record_buf, scheduler.batch_record_ct = [None] * 2, 0
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    runtime = getattr(pool, "runtime", None)
    if runtime is not None:
        runtime.passes = SimpleNamespace(run=lambda passes: None)


class Feed:
    """Request receiver in the place of SGLang's; between two polls lies one step."""

    def __init__(
        self, scheduler: Any, system: dict[str, Any], shape: Shape, answers: Any
    ) -> None:
        self.scheduler, self.rate, self.answers = scheduler, system["rate"], answers
        self.arrivals = arrivals(shape)
        self.block: dict[str, Any] | None = None
        self.steps: list[tuple[bool, float]] = []
        self.running: list[int] = []
        self.begin = 0.0
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def recv_requests(self, **_: Any) -> list[Any]:
        """One poll: note the step that ends here, hand out what arrives."""
        now = time.process_time()
        if self.block is not None:
            self._note(now - self.begin)
            if len(self.steps) >= self.block["steps"]:
                self._report()
        while self.block is None:
            if not self._command():
                return []
        missing = self.block["waiting"] - len(self.scheduler.waiting_queue)
        due = [message(next(self.arrivals), self.rate) for _ in range(missing)]
        self.begin = time.process_time()
        return due

    def answer(self, record: dict[str, Any]) -> None:
        """Send one line to the parent."""
        self.answers.write(json.dumps(record) + "\n")

    def _note(self, seconds: float) -> None:
        batch = self.scheduler.last_batch
        prefill = batch is not None and batch.forward_mode.is_extend()
        self.steps.append((prefill, seconds))
        self.running.append(len(self.scheduler.running_batch.reqs))

    def _command(self) -> bool:
        """Take the next command; False if there is nothing more to do."""
        line = sys.stdin.readline()
        command = json.loads(line) if line else {"op": "quit"}
        if command["op"] == "quit":
            self.scheduler.gracefully_exit = True
            return False
        self.block, self.steps, self.running = command, [], []
        policy = self.scheduler.policy
        policy.policy = policy._validate_and_adjust_policy(
            command["policy"], self.scheduler.tree_cache
        )
        self.spent.clear()
        self._watch(command["trace"])
        return True

    def _report(self) -> None:
        allocator = self.scheduler.token_to_kv_pool_allocator
        tree = self.scheduler.tree_cache
        self.answer(
            {
                "prefill": [t for prefill, t in self.steps if prefill],
                "decode": [t for prefill, t in self.steps if not prefill],
                "running": sum(self.running) / len(self.running),
                "waiting": len(self.scheduler.waiting_queue),
                "free": allocator.available_size(),
                "evictable": tree.evictable_size(),
                "calls": {name: pair[0] for name, pair in self.spent.items()},
                "spent": {name: pair[1] for name, pair in self.spent.items()},
            }
        )
        self._watch(False)
        self.block = None

    def _watch(self, on: bool) -> None:
        """Time calls of the tree from outside it; the clock costs time itself."""
        tree = self.scheduler.tree_cache
        inside = [False]

        def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            spent = self.spent[name]

            def timed(*args: Any, **keywords: Any) -> Any:
                if inside[0]:
                    return call(*args, **keywords)
                inside[0], begin = True, time.process_time()
                try:
                    return call(*args, **keywords)
                finally:
                    spent[0] += 1
                    spent[1] += time.process_time() - begin
                    inside[0] = False

            return timed

        for name in WATCHED:
            vars(tree).pop(name, None)
            if on:
                setattr(tree, name, watched(name, getattr(tree, name)))


if __name__ == "__main__":
    main()
