"""A base with an adapter to evaluate, and servers to judge: a real one, and one that replays recorded texts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from distft.config.evaluation import Evaluation
from distft.config.recipe import load_recipe
from distft.distributed.world import World
from distft.evaluation.target import Target

CHAT_TEMPLATE = (
    "{% for m in messages %}### {{ 'Instruction' if m['role'] == 'user' else 'Response' }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


@dataclass
class Recorded:
    """A server that says what it was told to. `says` turns a request's body and its number into a status and a text (an OpenAI answer is
    made of the text where the status is 200), or into a whole answer."""

    says: Callable[[dict[str, Any], int], tuple[int, str] | dict[str, Any]]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    reply_headers: dict[str, str] = field(default_factory=dict)
    address: str = ""
    busiest: int = 0
    delay_s: float = 0.0

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@pytest.fixture
def replay() -> Iterator[Callable[..., Recorded]]:
    """Starts such a server on loopback; its address is a base URL."""
    servers = []

    def start(says: Callable[[dict[str, Any], int], Any], **options: Any) -> Recorded:
        recorded = Recorded(says, **options)
        lock, busy = threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(recorded.bodies)
                    recorded.bodies.append(body)
                    recorded.headers.append({"path": self.path, **dict(self.headers)})
                    busy[0] += 1
                    recorded.busiest = max(recorded.busiest, busy[0])
                time.sleep(recorded.delay_s)
                said = recorded.says(body, number)
                with lock:
                    busy[0] -= 1
                status, answer = (200, said) if isinstance(said, dict) else (said[0], self._answer(*said))
                content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                for name, value in {**recorded.reply_headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def _answer(self, status: int, text: str) -> Any:
                if status != 200:
                    return text
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                return {"choices": [choice], "usage": {"completion_tokens": len(text.split())}}

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that has stopped waiting is what some tests are about."""

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        recorded.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return recorded

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def chat_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, which a server needs; it samples where it is asked to."""
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    # `transformers serve` samples only where the model's own settings say so, whatever the temperature.
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    return folder


@pytest.fixture(scope="session")
def served(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of `transformers serve` with that model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    program = Path(sys.executable).parent / "transformers"
    command = [
        str(program),
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, str(chat_model)], stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server does not come up: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model that was not trained, but says something else than its base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("trained") / "adapter"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules="all-linear")
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def target(adapter: Path) -> Target:
    """The tiny model and that adapter, in fp32, as one process has them."""
    return Target.load(load_recipe(["recipe=tiny", "model.dtype=float32", "quantization=null"]), adapter, World())


def evaluation(**sections: Any) -> Evaluation:
    """The section of a recipe."""
    return Evaluation.model_validate(sections)
