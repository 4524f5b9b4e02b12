"""A run that has learned to name the sentiment of reviews, models to evaluate and to judge, and servers that judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from distft.config.evaluation import Evaluation
from distft.config.recipe import load_recipe
from distft.data.toy import reviews
from distft.distributed.world import World
from distft.evaluation.target import Target
from distft.runs.folder import RunFolder
from tests.evaluation.servers import ReplayServer, free_port

CHAT_TEMPLATE = (
    "{% for m in messages %}### {{ 'Instruction' if m['role'] == 'user' else 'Response' }}:\n"
    "{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


def environment() -> dict[str, str]:
    """The environment of distft's processes in a test: offline, and one thread, because they share few cores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "DISTFT_OUTCOME"))}
    return kept | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def distft(where: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `distft` with `words` in the folder `where`, and check its exit code."""
    command = [sys.executable, "-m", "distft.cli", *words]
    ended = subprocess.run(command, cwd=where, env=environment(), capture_output=True, text=True, timeout=540)
    assert ended.returncode == code, f"exit code {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended


def evaluation(**sections: Any) -> Evaluation:
    """The `evaluation` section of a recipe."""
    return Evaluation.model_validate(sections)


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> RunFolder:
    """A finished run of `tiny_sentiment` in fp32 (60 steps), not evaluated. To write into it, use a copy (`run`)."""
    where = tmp_path_factory.mktemp("learned")
    distft(
        where,
        "train",
        "recipe=tiny_sentiment",
        "strategy=single",
        "quantization=null",
        "training.max_steps=60",
        "run.name=learned",
        "evaluation.before_and_after=false",
    )
    return RunFolder(where / "runs" / "learned")


@pytest.fixture
def run(learned: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of `learned` to evaluate."""
    shutil.copytree(learned.path, tmp_path / "runs" / "learned")
    return RunFolder(tmp_path / "runs" / "learned")


MULTIPLE_CHOICE = """\
task: sentiment_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: '{{{{question}}}}'
doc_to_choice: '{{{{choices}}}}'
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
GROUP = """\
group: sentiment
task: [sentiment_first, sentiment_second]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
GENERATION = """\
task: sentiment_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/first.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: '{{{{question}}}}'
doc_to_target: '{{{{choices[label]}}}}'
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of lm-eval with local documents: two multiple-choice tasks, their group, and a generation task."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "question": f"### Review:\n{row['text']}\n\n### Sentiment:\n",
            "choices": ["negative", "positive"],
            "label": row["label"],
        }
        for row in reviews(40, seed=99)
    ]
    for name, rows in (("first", documents[:24]), ("second", documents[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(MULTIPLE_CHOICE.format(name=name, folder=folder), encoding="utf-8")
    (folder / "group.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "write.yaml").write_text(GENERATION.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def load() -> Callable[..., Target]:
    """Loads the `Target` of a run folder, with overrides, in this process."""

    def target(folder: RunFolder, *words: str) -> Target:
        return Target.load(load_recipe([f"recipe={folder.recipe}", *words]), folder.adapter, World())

    return target


@pytest.fixture(scope="session")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained adapter of the tiny model, which answers differently from its base."""
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
    """The tiny model with that adapter, in fp32, on a single process."""
    return Target.load(load_recipe(["recipe=tiny", "model.dtype=float32", "quantization=null"]), adapter, World())


@pytest.fixture
def replay() -> Iterator[Callable[..., ReplayServer]]:
    """Starts replay servers, and closes them."""
    servers = []

    def start(reply: Callable[[dict[str, Any], int], Any], **options: Any) -> ReplayServer:
        servers.append(ReplayServer(reply, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def chat_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, which a server needs, and with sampling enabled."""
    folder = tmp_path_factory.mktemp("served") / "tiny-chat"
    shutil.copytree(tiny, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    # `transformers serve` samples only if the model's own settings say so, whatever the temperature.
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))
    return folder


@pytest.fixture(scope="session")
def served(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of `transformers serve` with that model."""
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    program = [str(Path(sys.executable).with_name("transformers")), "serve"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*program, *options, str(chat_model)],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
            pytest.fail(f"the server does not start: {log.read_text()}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)
