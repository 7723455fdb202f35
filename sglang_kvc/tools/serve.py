"""Serve a model with KV-Compress in one command: ``python -m sglang_kvc.tools.serve``.

A thin front of ``python -m sglang.launch_server --kv-compress``. It fetches a small
model if none is given, picks flags that work without a GPU, says when the server is
ready and prints requests to try. Ctrl-C stops the server.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from sglang_kvc.errors import KVCError
from sglang_kvc.tools.fetch_model import DEFAULT_MODEL, fetch

# One core decodes a few tokens per second, so a CPU server is for trying things out.
CPU_POOL_TOKENS = 20480
CPU_CONTEXT_TOKENS = 8192
CPU_MAX_REQUESTS = 16

_POLL_S = 2.0
_REPORT_S = 15.0
_STOP_S = 10.0


def has_gpu() -> bool:
    """Return whether the CUDA driver reports a device (without importing torch)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return False
    return count.value > 0


def server_command(
    model: Path | str, host: str, port: int, gpu: bool, extra: Sequence[str]
) -> list[str]:
    """Return the command that starts SGLang.

    Parameters
    ----------
    model : Path or str
        Folder of the model, or anything ``--model-path`` accepts.
    host, port : str, int
        Where to listen.
    gpu : bool
        Whether there is a GPU; without one, flags for the CPU are added.
    extra : sequence of str
        Flags of the user. They come last, so that they win.
    """
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", str(model), "--host", host, "--port", str(port)]
    command += ["--kv-compress"]
    if not gpu:
        command += ["--device", "cpu", "--dtype", "float32"]
        command += ["--max-total-tokens", str(CPU_POOL_TOKENS)]
        command += ["--context-length", str(_cpu_context(Path(model)))]
        command += ["--max-running-requests", str(CPU_MAX_REQUESTS)]
    return [*command, *extra]


def _cpu_context(model: Path) -> int:
    """Return the model's context length, capped at `CPU_CONTEXT_TOKENS`."""
    try:
        config = json.loads((model / "config.json").read_text())
        return min(CPU_CONTEXT_TOKENS, int(config["max_position_embeddings"]))
    except (OSError, KeyError, ValueError):
        return CPU_CONTEXT_TOKENS


def set_defaults(
    environ: MutableMapping[str, str], gpu: bool, local_model: bool
) -> None:
    """Add environment variables for the server; what the user set is kept.

    Parameters
    ----------
    environ : mutable mapping
        Changed in place.
    gpu : bool
        Whether the server runs on a GPU.
    local_model : bool
        Whether the model is a folder, so that no hub is needed.
    """
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A crashed server would otherwise wait 60 s for a core dump.
    environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
    environ.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")
    if local_model:
        environ.setdefault("HF_HUB_OFFLINE", "1")
    if not gpu:
        # On the CPU, torch.compile builds C++ at the first request: over a minute.
        environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def curl_lines(url: str) -> str:
    """Return two requests to paste into a shell: native API and OpenAI API.

    The budget is below the length of the answer, so eviction passes do happen.
    """
    options = {"kv_compress": {"budget": 64}}
    native = {
        "text": "Once upon a time there was a lighthouse keeper who",
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": 128,
            "ignore_eos": True,
            "custom_params": options,
        },
    }
    chat = {
        "model": "default",
        "messages": [{"role": "user", "content": "Tell me a story about a whale."}],
        "temperature": 0,
        "max_tokens": 128,
        "custom_params": options,
    }
    requests = (("/generate", native), ("/v1/chat/completions", chat))
    return "\n\n".join(
        f"curl -s {url}{path} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(json.dumps(body))}"
        for path, body in requests
    )


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    """Poll ``/health`` until it answers; False if the server exits before."""
    # A proxy meant for the outside world does not reach this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    start = reported = time.monotonic()
    while server.poll() is None:
        with contextlib.suppress(OSError), opener.open(f"{url}/health", timeout=30):
            return True
        now = time.monotonic()
        if now - reported >= _REPORT_S:
            reported = now
            _log(f"starting ... {now - start:.0f} s (the first start takes 1-3 min)")
        time.sleep(_POLL_S)
    return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and every process it started; returns when they are gone."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(_STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            _log("killing the server")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _run(command: Sequence[str], url: str) -> int:
    # A session of its own: Ctrl-C reaches us alone, and we stop the server in order.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        if wait_until_ready(server, url):
            _log(f"ready at {url}. Try:\n\n{curl_lines(url)}\n")
            _log("Ctrl-C stops the server")
        status = server.wait()
        _log(f"error: the server ended with status {status}; its log is above")
        return 1
    except KeyboardInterrupt:
        _log("stopping, Ctrl-C again kills it at once ...")
        return 0
    finally:
        stop(server)


def _is_taken(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _log(message: str) -> None:
    print(f"[serve] {message}", file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> None:
    del signum, frame
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_kvc.tools.serve",
        description="Serve a model with KV-Compress.",
        epilog="All other arguments go to sglang.launch_server unchanged.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", "--model-path", help=f"folder or name; default: {DEFAULT_MODEL}"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    known, extra = parser.parse_known_args(arguments)
    # `kill` and a closed terminal must stop the server just as Ctrl-C does, and a
    # shell that starts us in the background makes us ignore Ctrl-C's signal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    local_host = "127.0.0.1" if known.host == "0.0.0.0" else known.host
    if _is_taken(local_host, known.port):
        _log(f"error: port {known.port} is in use; give another one with --port")
        return 1
    try:
        model = known.model or fetch(DEFAULT_MODEL)
    except KVCError as error:
        _log(f"error: {error}")
        return 1
    gpu = has_gpu()
    set_defaults(os.environ, gpu, Path(model).is_dir())
    command = server_command(model, known.host, known.port, gpu, extra)
    _log("no GPU found, serving on the CPU" if not gpu else "serving on the GPU")
    _log(shlex.join(command))
    return _run(command, f"http://{local_host}:{known.port}")


if __name__ == "__main__":
    sys.exit(main())
