"""The commands of servers are those that vLLM and transformers document, and a real one answers as `distft chat`."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from distft.data.prompts import Message, render, token_ids
from distft.distributed.world import World
from distft.evaluation.engines.lora import obstacle_to_lora
from distft.evaluation.generate import Sampling
from distft.evaluation.request import Request
from distft.evaluation.serve import Served, chat_template_for, command, prepare
from tests.evaluation.servers import free_port

TURNS: list[Message] = [
    {"role": "user", "content": "What do whales eat?"},
    {"role": "assistant", "content": "Krill."},
    {"role": "user", "content": "And cats?"},
]


def words_of(served: Served, program: Any) -> list[str]:
    return command(program, served, "127.0.0.1", 8000)[1:]


def test_vllm_is_given_base_and_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://docs.vllm.ai/en/latest/features/lora/ and its reference of `vllm serve`."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    served = Served("org/base", "mine", "bfloat16", "/tok", "/runs/mine/adapter", 24, "v1", trust_remote_code=True)
    assert words_of(served, "vllm") == [
        *("serve", "org/base", "--host", "127.0.0.1", "--port", "8000", "--dtype", "bfloat16", "--trust-remote-code"),
        *("--revision", "v1", "--tokenizer", "/tok"),
        *("--enable-lora", "--max-lora-rank", "32", "--lora-modules", "mine=/runs/mine/adapter"),
    ]
    whole = Served("/merged", "mine", "float32")
    assert words_of(whole, "vllm")[-4:] == ["--dtype", "float32", "--served-model-name", "mine"]
    ours = ["serve", "mine", "--host", "127.0.0.1", "--port", "8000", "--dtype", "float32"]
    assert words_of(whole, "transformers") == ours


def test_what_vllm_cannot_load_as_an_adapter_is_merged(adapter: Path, tmp_path: Path) -> None:
    assert obstacle_to_lora({"r": 16}) is None and obstacle_to_lora({"r": 512}) is not None
    request = Request.to_talk_to(str(adapter), ["model.dtype=float32"])
    served = prepare(request, "vllm", tmp_path / "a", base=False)
    assert (served.adapter, served.rank) == (str(adapter), 4)
    assert AutoTokenizer.from_pretrained(served.tokenizer).chat_template


@pytest.mark.parametrize("template", ["instruction", "plain"])
def test_a_server_s_prompts_are_those_of_the_training_to_the_token(template: Any, tokenizer: Any) -> None:
    ours = token_ids(tokenizer, template, render(tokenizer, template, TURNS))
    theirs = tokenizer.apply_chat_template(
        TURNS, chat_template=chat_template_for(template, tokenizer), add_generation_prompt=True, tokenize=False
    )
    assert tokenizer(theirs, add_special_tokens=False)["input_ids"] == ours
    assert chat_template_for("chat", tokenizer) is None and chat_template_for(None, tokenizer) is None


def test_a_real_server_answers_as_the_model_in_this_process(adapter: Path, tmp_path: Path) -> None:
    from distft.evaluation.chat import Chat, load_target

    request = Request.to_talk_to(str(adapter), ["model.dtype=float32"])
    target, _ = load_target(request)
    assert target.world == World()
    expected = Chat(target, "instruction", Sampling(6)).ask(TURNS[0]["content"], lambda text: None).text
    served = prepare(request, "transformers", tmp_path, base=False)
    port = free_port()
    words, slow = command("transformers", served, "127.0.0.1", port), {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=tmp_path, env=slow)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=300) as client:
            for _ in range(900):
                assert process.poll() is None
                try:
                    if client.get("/health").is_success:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            asked = {"model": served.name, "messages": TURNS[:1], "max_tokens": 6, "temperature": 0, "stream": False}
            answer = client.post("/v1/chat/completions", json=asked).raise_for_status().json()
    finally:
        process.terminate()
        process.wait(60)
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()
