"""SGLang's real Scheduler in this process, fed from a list instead of a socket.

The event loops, radix cache, chunking, overlap and leak checks are SGLang's own; only
receiving requests and sending outputs are replaced. One scheduler per process.
"""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
os.environ.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")

import torch

from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.engine.liveness import LivenessWatch

IDLE_POLLS = 3


@dataclass
class Request:
    """One request of a test; `arrive` and `abort_at` count scheduler polls."""

    rid: str
    ids: list[int]
    max_new: int = 16
    kv: dict[str, Any] | None = None
    arrive: int = 0
    abort_at: int | None = None
    ignore_eos: bool = True
    stop: list[int] = field(default_factory=list)
    top_logprobs: int = 0
    logprob_start: int | None = None
    priority: int | None = None
    embeds: list[list[float]] | None = None
    lora_id: str | None = None
    tenant: str | None = None
    extra_key: str | None = None


@dataclass
class Output:
    """What the client would have received."""

    ids: list[int] = field(default_factory=list)
    finish: dict[str, Any] | None = None
    cached_tokens: int = 0
    kv: list[dict[str, Any]] = field(default_factory=list)
    top_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    retractions: int = 0


def make_server_args(model: str, *, compress: bool, **overrides: Any) -> Any:
    """ServerArgs for the CPU; `compress` False gives stock SGLang (torch_native)."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    args = {
        "model_path": model,
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "chunked_prefill_size": 256,
        "max_total_tokens": 16384,
        "max_running_requests": 16,
        **overrides,
    }
    if compress:
        from sglang_kvc.config.server_args import build_server_args

        return build_server_args(kv_compress=True, **args)
    return ServerArgs(attention_backend="torch_native", **args)


class Feed:
    """In the place of SGLang's request receiver: a load that arrives poll by poll.

    Parameters
    ----------
    scheduler : SGLang's Scheduler; told to leave its event loop when all is served.
    requests : the load.
    on_poll : called first at every poll, with its number.

    Attributes
    ----------
    waiting : requests that have not arrived yet.
    clock : number of the next poll.
    idle : polls in a row with nothing to do.
    """

    def __init__(
        self, scheduler: Any, requests: list[Request], on_poll: Callable[[int], None]
    ) -> None:
        self.scheduler, self.requests, self.on_poll = scheduler, requests, on_poll
        self.waiting = list(requests)
        self.clock = self.idle = 0

    def recv_requests(self, **_: Any) -> list[Any]:
        """What is due now, as messages; 0.5.23 passes timed out requests, none here."""
        now, self.clock = self.clock, self.clock + 1
        self.on_poll(now)
        out = self._due(now)
        if not out and not self.waiting and self.scheduler.is_fully_idle():
            self.idle += 1
            if self.idle > IDLE_POLLS:
                self.scheduler.gracefully_exit = True
        else:
            self.idle = 0
        return out

    def _due(self, now: int) -> list[Any]:
        from sglang.srt.managers.io_struct import AbortReq

        due = [r for r in self.waiting if r.arrive <= now]
        self.waiting = [r for r in self.waiting if r.arrive > now]
        aborted = [r for r in self.requests if r.abort_at == now]
        return [*map(_tokenized, due), *(AbortReq(rid=r.rid) for r in aborted)]


class InProcessScheduler:
    """A scheduler that serves lists of `Request`.

    Parameters
    ----------
    server_args : from `make_server_args`.
    rank : of several that serve together, each in a process of its own.
    ports : SGLang's PortArgs, which all ranks share; default, new ones.

    Attributes
    ----------
    sch : SGLang's Scheduler; what it receives and sends is replaced on the instance.
    on_poll : called at every poll with its number.
    watch : makes a load without progress fail.
    """

    def __init__(self, server_args: Any, rank: int = 0, ports: Any = None) -> None:
        self._sent: list[Any] = []
        self.sch = _scheduler(server_args, rank, ports)
        channels = self.sch.ipc_channels
        for sender in (channels.send_to_tokenizer, channels.send_to_detokenizer):
            sender.send_output = self._keep_output
        self.sch.schedule_stream = self.sch.device_module.Stream(priority=0)
        self.sch.schedule_stream.synchronize = lambda: None
        self.sch._war_barrier_enabled = False
        self.sch.result_queue = deque()
        self.on_poll: Callable[[int], None] | None = None
        self.watch = LivenessWatch(self.sch, self._sent)

    # Configuration ---------------------------------------------------------------

    def set_overlap(self, on: bool) -> None:
        """Choose the event loop."""
        sch = self.sch
        sch.enable_overlap = on
        sch.tp_worker.enable_overlap = on
        object.__setattr__(sch.batch_result_processor, "enable_overlap", on)
        if on and not hasattr(sch, "batch_record_buf"):
            sch.batch_record_buf, sch.batch_record_ct = [None] * 2, 0

    def set_priority(self, on: bool) -> None:
        """Switch priority scheduling, with preemption; larger numbers go first."""
        sch = self.sch
        sch.enable_priority_scheduling = sch.enable_priority_preemption = on
        sch.policy.enable_priority_scheduling = on
        sch.priority_scheduling_preemption_threshold = 0

    def set_chunk(self, tokens: int, mode: str = "auto") -> None:
        """Choose the chunked prefill size (-1: off) and `--kv-compress-chunks`."""
        runtime = self.allocator.get_kvcache().runtime
        self.sch.chunked_prefill_size = tokens if tokens > 0 else None
        runtime.chunk_rule = dataclasses.replace(
            runtime.chunk_rule, chunk_size=max(tokens, 0), mode=mode
        )

    def set_radix(self, on: bool) -> None:
        """Switch the prefix cache; the pool must be idle and is flushed."""
        self.flush()
        self.sch.tree_cache.disable = not on

    def flush(self) -> None:
        """SGLang's flush_cache, which must succeed."""
        assert self.sch.flush_cache(empty_cache=False)

    @property
    def allocator(self) -> Any:
        """SGLang's token allocator."""
        return self.sch.token_to_kv_pool_allocator

    # Serving ----------------------------------------------------------------------

    def serve(self, requests: list[Request]) -> dict[str, Output]:
        """Serve `requests` to the end; SGLang's idle check runs before it returns."""
        self._sent.clear()
        self.watch.reset()
        sch = self.sch
        sch.request_receiver = Feed(sch, requests, self._look)
        sch.gracefully_exit, sch.last_batch = False, None
        with torch.no_grad():
            if sch.enable_overlap:
                sch.event_loop_overlap()
            else:
                sch.event_loop_normal()
        return _collect(self._sent, requests)

    def _look(self, now: int) -> None:
        self.watch.look()
        if self.on_poll is not None:
            self.on_poll(now)

    def _keep_output(self, output: Any, recv_obj: Any = None) -> None:
        """In the place of `SenderWrapper.send_output`."""
        del recv_obj
        self._sent.append(output)


def _scheduler(server_args: Any, rank: int, ports: Any) -> Any:
    """SGLang's scheduler; since 0.5.21 its ranks are published beside the settings."""
    from sglang.srt import runtime_context
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import PortArgs

    ports = ports or PortArgs.init_new(server_args)
    if isinstance(UPSTREAM, Generation22):
        ranks = runtime_context.SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=rank)
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)
        return Scheduler(server_args, ports)
    runtime_context.publish(server_args, role="scheduler")
    return Scheduler(server_args, ports, rank, rank, 0, 0, 0, 0, None)


def _tokenized(request: Request) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    start = request.logprob_start
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=request.max_new,
        ignore_eos=request.ignore_eos,
        stop_token_ids=request.stop or None,
        custom_params={"kv_compress": request.kv} if request.kv is not None else None,
    )
    params.normalize(None)
    keys = {"extra_key": request.extra_key}
    # Where the OpenAI API puts a salt.
    salted = "cache_salt" if isinstance(UPSTREAM, Generation22) else "extra_key"
    if request.tenant is not None:
        keys[salted] = request.tenant
    return TokenizedGenerateReqInput(
        rid=request.rid,
        input_text=None,
        input_ids=array("q", request.ids),
        input_embeds=request.embeds,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=request.top_logprobs > 0 or start is not None,
        logprob_start_len=-1 if start is None else start,
        top_logprobs_num=request.top_logprobs,
        token_ids_logprob=None,
        stream=True,
        priority=request.priority,
        lora_id=request.lora_id,
        **keys,
    )


def _collect(sent: list[Any], requests: list[Request]) -> dict[str, Output]:
    from sglang.srt.managers.io_struct import unwrap_from_pickle

    outputs = {r.rid: Output() for r in requests}
    for message in sent:
        for i, rid in enumerate(getattr(message, "rids", None) or []):
            out = outputs[rid]
            if message.output_ids is not None:
                out.ids += list(message.output_ids[i])
            out.finish = message.finished_reasons[i] or out.finish
            out.cached_tokens = message.cached_tokens[i]
            if message.retraction_counts:
                out.retractions = message.retraction_counts[i]
            info = unwrap_from_pickle(message.customized_info)
            if info:
                out.kv += [s for s in info["kv_compress"][i] if s is not None]
            values = message.output_top_logprobs_val
            if values and values[i]:
                for val, idx in zip(
                    values[i], message.output_top_logprobs_idx[i], strict=True
                ):
                    out.top_logprobs.append(list(zip(val, idx, strict=True)))
    for message in sent:
        rid = getattr(message, "rid", None)
        if rid in outputs and outputs[rid].finish is None:
            outputs[rid].finish = getattr(message, "finished_reason", None)
    return outputs
