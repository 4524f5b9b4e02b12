"""Answers from `vllm serve`, a server of our own on this process's device, reached over loopback.

vLLM cannot run inside a launched group of processes. The server loads the base a second time, next to the copy in this
process, and takes 90% of the memory that is free on the device.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from distft.data.prompts import Message, Template, render, token_ids
from distft.errors import ModelError
from distft.evaluation.engines.lora import lora_words
from distft.evaluation.engines.openai import Client
from distft.evaluation.engines.supervise import GRACE_S
from distft.evaluation.generate import Answer, Item, item_seed

_BASE, _ADAPTER = "base", "adapter"  # the names under which the server knows the models
_CONCURRENCY = 256  # vLLM batches by itself: this many requests keep it busy
_TIMEOUT_S = 3_600.0  # a request waits for its turn on the server
_RETRIES = 2
_START_S = 3_600.0  # a large model is loaded and compiled
_POLL_S = 0.5
_REMEDY = "; evaluation.generation.engine=transformers does without vLLM"
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Served:
    """What `vllm serve` serves: a model, and an adapter on it unless `adapter` is None."""

    model: str
    revision: str | None
    dtype: str
    trust_remote_code: bool
    adapter: str | None = None
    lora_rank: int = 0

    def command(self, port: int, memory_share: float) -> list[str]:
        """The command line. `memory_share` is the share of the device's memory that the server may take."""
        command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            self.model,
            "--served-model-name",
            _BASE,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--dtype",
            self.dtype,
            "--generation-config",
            "vllm",  # ignore sampling defaults that come with the model
            "--gpu-memory-utilization",
            f"{memory_share:.4f}",
            "--uvicorn-log-level",
            "warning",
        ]
        if self.revision is not None:
            command += ["--revision", self.revision]
        if self.trust_remote_code:
            command += ["--trust-remote-code"]
        if self.adapter is not None:
            command += lora_words(_ADAPTER, self.adapter, self.lora_rank)
        return command

    @property
    def name(self) -> str:
        """The model to ask for in requests."""
        return _BASE if self.adapter is None else _ADAPTER


def server_environment(environment: Mapping[str, str], device: int, key: str) -> dict[str, str]:
    """`environment` for a server on `device` alone, outside our group of processes, that wants `key` from its
    clients."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC")
    }
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[device] if visible else str(device)
    return kept | {"CUDA_VISIBLE_DEVICES": chosen, "VLLM_API_KEY": key}


class Server:
    """A server process on loopback. It and all its children end with this object, and with this process."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distft.evaluation.engines.supervise", *command],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C is for us, and we end the server
        )
        self._end = weakref.finalize(self, _end, self._process)

    def wait_until_healthy(self, base_url: str, timeout_s: float = _START_S) -> None:
        """Wait until `base_url`/health responds with success.

        Raises:
            ModelError: the server exited, or is not healthy after `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while True:
                self.check()
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{base_url}/health").is_success:
                        return
                if time.monotonic() > deadline:
                    raise ModelError(f"vLLM did not start within {timeout_s:.0f} s{_REMEDY}")
                time.sleep(_POLL_S)

    def check(self) -> None:
        """Raises:
        ModelError: the server has exited.
        """
        code = self._process.poll()
        if code is not None:
            raise ModelError(f"vLLM exited with code {code}; its own message is above{_REMEDY}")

    def close(self) -> None:
        """End the server and its children."""
        self._end()


class VllmEngine:
    """Answers from a server that starts when the first answer has to be written.

    Prompts are sent as token ids, so that they are exactly those of the engine in this process.
    """

    def __init__(
        self,
        served: Served,
        tokenizer: Any,
        identity: Mapping[str, Any],
        *,
        template: Template,
        device: int,
        end_tokens: Sequence[int],
        max_positions: int | None,
    ) -> None:
        self._served, self._tokenizer, self._template = served, tokenizer, template
        self._device, self._end_tokens, self._max_positions = device, list(end_tokens), max_positions
        self._identity = {**identity, "engine": "vllm", "template": template}
        self._server: Server | None = None
        self._client: Client | None = None

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def prompt(self, messages: Sequence[Message]) -> str:
        return render(self._tokenizer, self._template, messages)

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Raises:
        ModelError: vLLM cannot start, has exited, or rejects a request.
        """
        indices: list[int] = []
        bodies: list[dict[str, Any]] = []
        for index, item in enumerate(items):
            body = self.body(item)
            if body["max_tokens"] < 1:
                yield index, Answer("", 0, False)
            else:
                indices.append(index)
                bodies.append(body)
        if not bodies:
            return
        client = self._client or self._start()
        try:
            for number, answer in client.complete(bodies):
                yield indices[number], answer
        except ModelError:
            if self._server is not None:
                self._server.check()  # says more than a failed request if the server has exited
            raise

    def body(self, item: Item) -> dict[str, Any]:
        """The request for an item; its `max_tokens` is below 1 if the prompt leaves no room for an answer."""
        prompt, sampling = self.prompt(item.messages), item.sampling
        ids = token_ids(self._tokenizer, self._template, prompt)
        limit = sampling.max_new_tokens
        if self._max_positions is not None:
            limit = min(limit, self._max_positions - len(ids))
        return {
            "model": self._served.name,
            "prompt": ids,
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": item_seed(sampling, prompt),
            "stop_token_ids": self._end_tokens,
        }

    def _start(self) -> Client:
        import torch

        free, total = torch.cuda.mem_get_info(self._device)  # this process's copy of the model takes the rest
        key = secrets.token_urlsafe()
        port = _free_port()
        command = self._served.command(port, 0.9 * free / total)
        self._server = Server(command, server_environment(os.environ, self._device, key))
        base_url = f"http://127.0.0.1:{port}"
        self._server.wait_until_healthy(base_url)
        self._client = Client(
            httpx.URL(f"{base_url}/v1/completions"),
            "vLLM",
            ModelError,
            concurrency=_CONCURRENCY,
            retries=_RETRIES,
            timeout_s=_TIMEOUT_S,
            key=key,
            remedy=_REMEDY,
            trust_env=False,
        )
        return self._client


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()  # the supervisor then ends the server
    try:
        process.wait(GRACE_S + 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
