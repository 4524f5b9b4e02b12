"""A GGUF file in llama.cpp, as one side of a proof: `llama-server` on the PATH, or the package xllamacpp.

Both speak the API of llama.cpp's server. Its probabilities are of the next token after a prompt, so each position is a
request; the server keeps what it has read of the prompt before.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from distft.errors import MissingExtraError, ModelError
from distft.export.distance import Predictions
from distft.export.ollama import rendered
from distft.export.replay import Replay
from distft.export.sides import KEPT, as_predictions

_START_S = 600
_ALL = 1 << 24
"""More tokens than any vocabulary has."""


def available() -> str | None:
    """The llama.cpp that would be used; None if there is none."""
    if shutil.which("llama-server"):
        return "llama-server"
    return "xllamacpp" if importlib.util.find_spec("xllamacpp") is not None else None


@contextmanager
def serve(file: Path, context: int) -> Iterator[LlamaCppSide]:
    """llama.cpp with the GGUF `file` and room for `context` tokens, while the block runs.

    Raises:
        MissingExtraError: there is no llama.cpp.
        ModelError: it does not load the file.
    """
    which = available()
    if which is None:
        raise MissingExtraError("proofs of GGUF files", "xllamacpp", "export")
    # Its threads spin while they wait for each other: on cores that others use, too, one is the fastest.
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    port = _free_port() if which == "llama-server" else 0
    command = (
        ["llama-server", "-m", str(file), "-c", str(context), "--port", str(port), "-np", "1", "-t", threads, "--jinja"]
        if which == "llama-server"
        else [sys.executable, "-m", "distft.export.llama_server", str(file), str(context), threads]
    )
    log = file.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    try:
        address = f"http://127.0.0.1:{port}" if port else _address(process)
        with httpx.Client(base_url=address, timeout=_START_S) as client:
            _wait(client, process, log)
            yield LlamaCppSide(client)
    finally:
        process.kill()
        process.wait()
        log.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _address(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith(b"http"):
            return line.decode().strip()
    return "http://127.0.0.1:9"  # it has ended: `_wait` says why


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    told = (errors or lines or ["it says nothing"])[-1]
    raise ModelError(f"llama.cpp does not load the file: {told.strip()}")


@dataclass
class LlamaCppSide:
    """llama.cpp's server at the base URL of `client`."""

    client: httpx.Client

    def build(self) -> str:
        return str(self._get("/props").get("build_info", "unknown"))

    @cached_property
    def begins(self) -> str:
        """Chat templates lose their first token where the file has llama.cpp add it."""
        with_it, without = (
            self._post("/tokenize", {"content": "a", "add_special": each, "parse_special": True})["tokens"]
            for each in (True, False)
        )
        return str(self._get("/props")["bos_token"]) if len(with_it) > len(without) else ""

    def render(self, item: Replay) -> str | None:
        asked = {"messages": item.messages} | ({"tools": item.tools} if item.tools else {})
        return str(self._post("/apply-template", asked)["prompt"])

    def ids(self, text: str, *, chat: bool) -> list[int]:
        """As the server does with a prompt, whether it comes from a template or not."""
        return list(self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def stops(self) -> set[int] | None:
        return None

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends when this token is drawn."""
        drawn = {"prompt": [token], "n_predict": 4, "logit_bias": [[token, 1e4]], "temperature": 0, "top_k": 1}
        return bool(self._post("/completion", drawn)["stop_type"] == "eos")

    def predictions(self, items: Sequence[Replay]) -> list[Predictions]:
        return [as_predictions([self._next(item.ids[:at], item.ids[at]) for at in item.trained]) for item in items]

    def _next(self, before: list[int], reference: int) -> tuple[list[int], list[float], float]:
        """The likeliest tokens after some, their log-probabilities, and that of the `reference`."""
        likeliest = self._probabilities(before, KEPT)
        known = dict(likeliest)
        if reference not in known:
            known = dict(self._probabilities(before, _ALL))
        tokens, logs = zip(*likeliest, strict=True)
        return list(tokens), list(logs), known.get(reference, float("-inf"))

    def _probabilities(self, before: list[int], number: int) -> list[tuple[int, float]]:
        asked = {"prompt": before, "n_predict": 1, "temperature": 0, "n_probs": number, "cache_prompt": True}
        found = self._post("/completion", asked)["completion_probabilities"]
        if not found:  # the token that it drew ends the answer
            raise ModelError("llama.cpp gave no probabilities; a newer one does")
        return [(int(one["id"]), float(one["logprob"])) for one in found[0]["top_logprobs"]]

    def continuations(self, items: Sequence[Replay], tokens: int) -> list[list[int]]:
        asked = {"n_predict": tokens, "temperature": 0, "top_k": 1, "cache_prompt": True, "return_tokens": True}
        return [list(self._post("/completion", {"prompt": item.opening, **asked})["tokens"]) for item in items]

    def _get(self, path: str) -> Any:
        return self._answer(self.client.get(path))

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._answer(self.client.post(path, json=body))

    def _answer(self, response: httpx.Response) -> Any:
        if response.status_code != 200:
            raise ModelError(f"llama.cpp refuses {response.request.url.path}: {response.text[:300]}")
        return response.json()


@dataclass
class OllamaSide(LlamaCppSide):
    """llama.cpp as Ollama runs it: prompts come from the Modelfile."""

    template: str = ""
    system: str | None = None

    def render(self, item: Replay) -> str | None:
        return None if item.tools else rendered(self.template, self.system, item.messages or ())
