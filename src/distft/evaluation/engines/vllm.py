"""Answers by vLLM, in a process of its own on this process's device: vLLM and a launched group of processes do not share one.

It loads the base a second time, beside the copy that is evaluated otherwise, and takes 90% of what is free on the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distft.errors import ModelError
from distft.evaluation.generate import Answer, Item, Message, Template, item_seed, rendered, token_ids

RANKS = (8, 16, 32, 64, 128, 256)
"""What vLLM can reserve for a LoRA adapter."""
_CHUNK = 256  # prompts that go to it at once: it batches them itself, and a kill loses no more than these
_OURS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class VllmEngine:
    """`wanted` is what `vllm_worker` loads: model, revision, dtype, trust_remote_code, adapter, max_lora_rank. It starts at the first answer
    that has to be written."""

    def __init__(
        self,
        wanted: Mapping[str, Any],
        tokenizer: Any,
        identity: Mapping[str, Any],
        *,
        template: Template,
        device: int,
        ends: Sequence[int],
        positions: int | None,
    ) -> None:
        self._wanted, self._tokenizer, self._template = wanted, tokenizer, template
        self._device, self._ends, self._positions = device, list(ends), positions
        self._identity = {**identity, "engine": "vllm", "template": template}
        self._process: subprocess.Popen[str] | None = None
        self._replies: Any = None

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def prompt(self, messages: Sequence[Message]) -> str:
        return rendered(self._tokenizer, self._template, messages)

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Raises:
        ModelError: vLLM cannot start or has ended; what it printed stands above.
        """
        todo: list[tuple[int, dict[str, Any]]] = []
        for index, item in enumerate(items):
            prompt = self.prompt(item.messages)
            ids = token_ids(self._tokenizer, self._template, prompt)
            limit = item.sampling.max_new_tokens
            if self._positions is not None:
                limit = min(limit, self._positions - len(ids))
            if limit < 1:
                yield index, Answer("", 0, False)
                continue
            sampling = item.sampling
            todo.append((index, {
                "ids": ids, "limit": limit, "temperature": sampling.temperature, "top_p": sampling.top_p,
                "seed": item_seed(sampling, prompt), "ends": self._ends,
            }))  # fmt: skip
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            for (index, _), one in zip(chunk, self._ask([one for _, one in chunk]), strict=True):
                yield index, Answer(one["text"], one["tokens"], one["finished"])

    def _ask(self, line: Any) -> Any:
        if self._process is None:
            self._start()
            self._exchange(dict(self._wanted))
        return self._exchange(line)

    def _start(self) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        device = visible.split(",")[self._device] if visible else str(self._device)
        kept = {
            key: value for key, value in os.environ.items() if key not in _OURS and not key.startswith("TORCHELASTIC")
        }
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distft.evaluation.engines.vllm_worker", str(writing)],
            stdin=subprocess.PIPE, stdout=sys.stderr, pass_fds=(writing,), text=True, env=kept | {"CUDA_VISIBLE_DEVICES": device},
        )  # fmt: skip
        os.close(writing)
        self._replies = os.fdopen(reading, encoding="utf-8")
        weakref.finalize(self, _end, self._process, self._replies)

    def _exchange(self, line: Any) -> Any:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
            reply = self._replies.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise ModelError(
                f"vLLM has ended with exit code {self._process.wait()}, and says why above; evaluation.generation.engine=transformers does without it"
            )
        return json.loads(reply)


def _end(process: subprocess.Popen[str], replies: Any) -> None:
    replies.close()
    if process.stdin is not None:
        process.stdin.close()  # its sign to end
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
