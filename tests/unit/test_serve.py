"""`make serve`: command line, environment, printed requests, start and stop."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_kvc.tools import serve

FAKE_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(port: int, server_code: str) -> subprocess.Popen[str]:
    """Run the front end with SGLang replaced by ``server_code``."""
    front = (
        "import sys; from sglang_kvc.tools import serve\n"
        f"command = [sys.executable, '-c', {server_code!r}, '{port}']\n"
        "serve.server_command = lambda *_: command\n"
        f"sys.exit(serve.main(['--model', '.', '--port', '{port}']))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", front], stderr=subprocess.PIPE, text=True
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was not printed:\n{seen}")


def test_cpu_command(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    extra = ["--kv-compress-rate", "8", "--dtype", "bfloat16"]
    command = serve.server_command(tmp_path, "127.0.0.1", 1234, False, extra)
    line = shlex.join(command)
    assert f"--model-path {tmp_path} --host 127.0.0.1 --port 1234" in line
    assert "--kv-compress --device cpu --dtype float32" in line
    assert "--context-length 2048" in line
    assert command[-4:] == extra, "flags of the user must win"


@pytest.mark.parametrize("config", ['{"max_position_embeddings": 32768}', "{}", "["])
def test_cpu_context_is_capped(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    command = serve.server_command(tmp_path, "127.0.0.1", 1, False, [])
    length = command[command.index("--context-length") + 1]
    assert length == str(serve.CPU_CONTEXT_TOKENS)


def test_gpu_command_leaves_the_choices_to_sglang() -> None:
    command = serve.server_command("org/model", "0.0.0.0", 1, True, [])
    assert command[-1] == "--kv-compress"


def test_environment_of_the_user_is_kept() -> None:
    environment = {"TORCHDYNAMO_DISABLE": "0"}
    serve.set_defaults(environment, gpu=False, local_model=True)
    assert environment["TORCHDYNAMO_DISABLE"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_gpu_and_hub_model_change_less() -> None:
    environment: dict[str, str] = {}
    serve.set_defaults(environment, gpu=True, local_model=False)
    assert "TORCHDYNAMO_DISABLE" not in environment
    assert "HF_HUB_OFFLINE" not in environment


def test_printed_requests_are_valid() -> None:
    commands = serve.curl_lines("http://127.0.0.1:30000").split("\n\n")
    bodies = []
    for command, path in zip(
        commands, ("generate", "v1/chat/completions"), strict=True
    ):
        words = shlex.split(command.replace("\\\n", " "))
        assert words[:3] == ["curl", "-s", f"http://127.0.0.1:30000/{path}"]
        bodies.append(json.loads(words[words.index("-d") + 1]))
    native, chat = bodies
    assert native["sampling_params"]["custom_params"]["kv_compress"]["budget"] > 0
    assert chat["custom_params"] == native["sampling_params"]["custom_params"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_server(number: signal.Signals) -> None:
    port = free_port()
    process = start(port, FAKE_SERVER)
    printed = read_until(process, "Ctrl-C stops")
    assert f"ready at http://127.0.0.1:{port}" in printed
    assert "/v1/chat/completions" in printed
    process.send_signal(number)
    assert process.wait(timeout=30) == 0
    assert not serve._is_taken("127.0.0.1", port)


def test_server_that_dies_is_an_error() -> None:
    process = start(free_port(), "raise SystemExit(3)")
    read_until(process, "error: the server ended with status 3")
    assert process.wait(timeout=30) == 1


def test_taken_port_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 1
    assert f"error: port {port} is in use" in capsys.readouterr().err
