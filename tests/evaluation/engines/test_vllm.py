"""`vllm serve` as our server: its command line and environment, requests, and the life of its process group.

vLLM itself is not part of the test environment, so other servers stand in where a process has to run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.config.recipe import load_recipe
from distft.distributed.world import World
from distft.errors import MissingExtraError, ModelError
from distft.evaluation.engines.choose import choose_engine, obstacle_to_vllm
from distft.evaluation.engines.openai import Client
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.engines.vllm import Served, Server, VllmEngine, server_environment
from distft.evaluation.generate import Item, Sampling, item_seed
from distft.evaluation.target import Target
from tests.evaluation.conftest import evaluation
from tests.evaluation.servers import free_port

without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
HI = Item(({"role": "user", "content": "Hi there"},), Sampling(20, 0.5, 0.9, seed=3))


def options_of(command: Sequence[str]) -> dict[str, str | None]:
    """The options after `vllm serve MODEL`, with None for flags."""
    found: dict[str, str | None] = {}
    for word, following in zip(command, [*command[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = None if following.startswith("--") else following
    return found


def test_the_command_serves_a_base_on_loopback() -> None:
    command = Served("/models/llama", None, "bfloat16", trust_remote_code=False).command(8123, 0.45)
    assert Path(command[0]) == Path(sys.executable).with_name("vllm")
    assert command[1:3] == ["serve", "/models/llama"]
    assert options_of(command) == {
        "--served-model-name": "base",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--dtype": "bfloat16",
        "--generation-config": "vllm",
        "--gpu-memory-utilization": "0.4500",
        "--uvicorn-log-level": "warning",
    }


@pytest.mark.parametrize(("rank", "reserved"), [(4, "8"), (8, "8"), (24, "32"), (256, "256")])
def test_the_command_reserves_the_next_lora_rank_that_vllm_knows(rank: int, reserved: str) -> None:
    served = Served("hub/model", "v1", "float16", True, "/runs/a/adapter", rank)
    options = options_of(served.command(8123, 0.9))
    assert options["--lora-modules"] == "adapter=/runs/a/adapter" and served.name == "adapter"
    assert options["--max-lora-rank"] == reserved
    assert {"--enable-lora", "--trust-remote-code"} <= options.keys() and options["--revision"] == "v1"


def test_the_server_sees_one_device_and_none_of_the_launchers_variables() -> None:
    ours = {"RANK": "1", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "x", "CUDA_VISIBLE_DEVICES": "4,6", "PATH": "/bin"}
    theirs = server_environment(ours, device=1, key="secret")
    assert theirs == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "6", "VLLM_API_KEY": "secret"}
    assert server_environment({}, device=1, key="")["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_request_has_the_tokens_of_the_prompt_and_everything_that_decides_the_answer(tokenizer: Any) -> None:
    served = Served("m", None, "float32", False, "/adapter", 8)
    engine = VllmEngine(
        served, tokenizer, {"weights": "w"}, template="plain", device=0, end_tokens=[2, 5], max_positions=1_024
    )
    assert engine.identity == {"weights": "w", "engine": "vllm", "template": "plain"}
    ids = tokenizer("Hi there")["input_ids"]
    assert engine.body(HI) == {
        "model": "adapter",
        "prompt": ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids,
        "max_tokens": 20,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": item_seed(HI.sampling, "Hi there"),
        "stop_token_ids": [2, 5],
    }


def test_a_prompt_that_leaves_no_room_has_no_answer_and_starts_no_server(tokenizer: Any) -> None:
    served = Served("m", None, "float32", trust_remote_code=False)
    engine = VllmEngine(served, tokenizer, {}, template="plain", device=0, end_tokens=[2], max_positions=2)
    ((index, answer),) = engine.write([HI])
    assert (index, answer.text, answer.finished) == (0, "", False) and engine._server is None


def test_text_completions_of_a_real_server_are_what_the_model_writes(served: str, chat_model: Path) -> None:
    """As vLLM is asked: `/v1/completions`, with a prompt that is rendered already."""
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    item = Item(({"role": "user", "content": "Tell me something."},), Sampling(16))
    engine = TransformersEngine(model, tokenizer, {}, batch_tokens=1_000, template="plain")
    (_, expected), *_ = engine.write([item])
    client = Client(
        httpx.URL(f"{served}/completions"), "the server", ModelError, concurrency=2, retries=0, timeout_s=60.0
    )
    body = {"model": str(chat_model), "prompt": "Tell me something.", "max_tokens": 16, "temperature": 0.0}
    found = dict(client.complete([body, body]))
    assert found[0].text == found[1].text == expected.text


def serve(folder: Path) -> tuple[Server, str]:
    """Python's own HTTP server, healthy once `folder`/health exists, with a child that would outlive it."""
    port = free_port()
    program = textwrap.dedent(f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open("pids", "w").write(str(child.pid))
        sys.argv = ["http.server", "{port}", "--bind", "127.0.0.1"]
        import runpy
        runpy.run_module("http.server", run_name="__main__")
    """)
    command = ["env", "-C", str(folder), sys.executable, "-c", program]
    return Server(command, os.environ), f"http://127.0.0.1:{port}"


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_server_is_waited_for_and_ends_with_its_children(tmp_path: Path) -> None:
    server, url = serve(tmp_path)
    with pytest.raises(ModelError, match=r"did not start within 2 s; evaluation\.generation\.engine=transformers"):
        server.wait_until_healthy(url, timeout_s=2.0)  # it responds, but with 404
    (tmp_path / "health").touch()
    server.wait_until_healthy(url, timeout_s=30.0)
    child = int((tmp_path / "pids").read_text())
    assert not has_ended(child)
    server.close()
    wait_for(lambda: has_ended(child))
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
    with pytest.raises(ModelError, match="exited with code"):
        server.check()


def test_a_server_ends_with_its_children_if_we_are_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from tests.evaluation.engines.test_vllm import serve;"
        "server, url = serve(Path(sys.argv[1])); print(url, flush=True); time.sleep(600)"
    )
    ours = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None and ours.stdout.readline().startswith("http://")
    wait_for(lambda: (tmp_path / "pids").is_file() and (tmp_path / "pids").read_text() != "")
    child = int((tmp_path / "pids").read_text())
    assert not has_ended(child)
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    wait_for(lambda: has_ended(child))


def test_a_server_that_cannot_start_is_an_error_with_a_remedy() -> None:
    server = Server([sys.executable, "-c", "raise SystemExit(3)"], os.environ)
    with pytest.raises(ModelError, match=r"exited with code 3; .*evaluation\.generation\.engine=transformers"):
        server.wait_until_healthy("http://127.0.0.1:1")


@without_vllm
def test_without_vllm_the_server_cannot_start() -> None:
    server = Server(Served("m", None, "float32", trust_remote_code=False).command(1, 0.5), os.environ)
    with pytest.raises(ModelError, match="vLLM exited with code 1"):
        server.wait_until_healthy("http://127.0.0.1:1")


def unloaded_target(adapter_config: dict[str, Any] | None, folder: Path, device: str, *words: str) -> Target:
    """As much of a target as the choice of an engine needs."""
    if adapter_config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    result = None if adapter_config is None else folder
    recipe = load_recipe(["recipe=tiny", *words])
    identity: Any = {"base": "b", "adapter": "a"}
    return Target(recipe, World(), None, torch.device(device), result, result is not None, identity)


PLAIN_LORA = {"r": 8, "use_dora": False, "modules_to_save": None, "rank_pattern": {}}


@pytest.mark.parametrize(
    ("config", "device", "quantization", "obstacle"),
    [
        (None, "cpu", "null", "no GPU"),
        (None, "cuda:0", "{load_in_4bit: true}", "does not quantise"),
        ({"r": 8, "use_dora": True}, "cuda:0", "null", "use_dora"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "cuda:0", "null", "modules_to_save"),
        ({"r": 300}, "cuda:0", "null", "up to rank 256"),
        (PLAIN_LORA, "cuda:0", "null", None),
        (None, "cuda:0", "null", None),
    ],
)
def test_vllm_is_chosen_only_if_it_would_write_what_was_trained(
    config: dict[str, Any] | None, device: str, quantization: str, obstacle: str | None, tmp_path: Path
) -> None:
    found = obstacle_to_vllm(unloaded_target(config, tmp_path, device, f"quantization={quantization}"))
    assert found is None if obstacle is None else found is not None and obstacle in found


@without_vllm
def test_asking_for_vllm_without_it_names_the_extra(tmp_path: Path) -> None:
    settings = evaluation(generation={"engine": "vllm"})
    with pytest.raises(MissingExtraError, match=r"pip install 'distft\[vllm\]'"):
        choose_engine(unloaded_target(None, tmp_path, "cuda:0"), settings, "base", "plain")
