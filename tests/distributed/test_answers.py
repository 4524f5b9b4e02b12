"""Models that were trained on conversations answer and stop: from the saved run, in other libraries, and merged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import distft
from distft.cli.main import main
from distft.data.named_templates import CHATML
from distft.evaluation.request import Request
from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

from ..data.rows import read_rows, write_rows
from ..pretrained import smollm2
from .conftest import Ended, finish, start

ANSWERS = {"Who?": "Me.", "When?": "Today.", "Where?": "Here.", "How?": "So."}
ALL = ("data.validation_fraction=0", "data.test_fraction=0", "training.eval_strategy=no", "tracking.report_to=[]")
RUN = (
    *("recipe=tiny", "quantization=null", "data.name=chats.jsonl", "data.chat_template=own.jinja", *ALL),
    *("evaluation.before_and_after=false", "lora.lora_dropout=0", "training.learning_rate=0.005"),
    *("training.lr_scheduler_type=constant", "training.warmup_steps=0", "training.logging_steps=1"),
    *("batching.global_batch_size=4", "training.save_strategy=steps", "training.save_total_limit=null"),
)
KINDS = {
    "adapter": ("training.max_steps=60", "training.save_steps=30"),
    # The tokenizer of the base, which lacks the new tokens, is named: the saved one must be used all the same.
    "model": (
        *("lora=null", "model.tokenizer=tiny", "training.learning_rate=0.001", "training.max_steps=40"),
        "training.save_steps=20",
    ),
}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def go(where: Path, *words: str) -> Ended:
    command = [sys.executable, "-m", "distft.cli", "train", *words, "--nproc", "1"]
    ended = finish(start(command, where, OMP_NUM_THREADS="1"), where)
    assert ended.code == 0, ended.stderr[-3000:]
    return ended


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A run of a base without a template on four conversations. Its template's file is gone, and the model's tokenizer
    has new tokens."""
    where = tmp_path_factory.mktemp(request.param)
    write_rows(where / "chats.jsonl", [chat(*pair) for pair in ANSWERS.items()])
    (where / "own.jinja").write_text(CHATML, encoding="utf-8")
    ended = go(where, *RUN, *KINDS[request.param])
    (where / "own.jinja").unlink()
    return ended


def result_of(folder: RunFolder) -> Path:
    return folder.adapter if folder.adapter.is_dir() else folder.model


def stops(saved: Path) -> list[int]:
    found = GenerationConfig.from_pretrained(saved).eos_token_id
    return found if isinstance(found, list) else [found]


def answers(model: Any, tokenizer: Any) -> dict[str, str]:
    """What the model says to each question, with the token at which it stops by its own settings."""
    found = {}
    for question in ANSWERS:
        asked = tokenizer.apply_chat_template(
            chat(question, "")["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**asked, do_sample=False, max_new_tokens=16)[0, asked["input_ids"].shape[1] :]
        found[question] = str(tokenizer.decode(said))
    return found


EXPECTED = {question: f"{answer}<|im_end|>" for question, answer in ANSWERS.items()}


def test_the_saved_run_answers_and_stops(trained: Ended) -> None:
    losses = [record["loss"] for record in trained.folder.read_metrics() if "loss" in record]
    assert losses[-1] < 0.3 < losses[0]
    assert answers(*distft.Run(trained.folder.path).load()) == EXPECTED


def test_so_does_what_peft_and_transformers_load(trained: Ended, tiny: Path) -> None:
    saved = result_of(trained.folder)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == CHATML
    if saved == trained.folder.adapter:
        base = AutoModelForCausalLM.from_pretrained(tiny)
        base.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(base, saved)
        model.generation_config = GenerationConfig.from_pretrained(saved)
    else:
        model = AutoModelForCausalLM.from_pretrained(saved)
    assert answers(model.eval(), tokenizer) == EXPECTED


def test_checkpoints_have_template_and_stop_tokens(trained: Ended) -> None:
    end = AutoTokenizer.from_pretrained(result_of(trained.folder)).convert_tokens_to_ids("<|im_end|>")
    checkpoints = list(trained.folder.checkpoints.glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for saved in (*checkpoints, result_of(trained.folder)):
        assert end in stops(saved)
        assert AutoTokenizer.from_pretrained(saved).chat_template == CHATML


def test_an_evaluation_uses_the_template_that_was_saved(trained: Ended) -> None:
    words = [str(trained.folder.path)]
    request = Request.of(words, preflight_checks=False)
    assert request.recipe.data.chat_template == str(result_of(trained.folder).absolute() / "chat_template.jinja")
    given = Request.of([*words, "data.chat_template=chatml"], preflight_checks=False)
    assert given.recipe.data.chat_template == "chatml", "an override goes first"


def test_a_merged_adapter_answers_and_stops(trained: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["merge", str(trained.folder.path), "--output", str(tmp_path / "merged")])
    if result_of(trained.folder) == trained.folder.model:
        assert code == 2 and "adapter" in capsys.readouterr().err
        return
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert tokenizer.chat_template == CHATML and answers(model, tokenizer) == EXPECTED


def test_a_resumed_run_ends_with_the_same_rows(trained: Ended, tmp_path: Path) -> None:
    shutil.copytree(trained.runs.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "own.jinja").write_text(CHATML, encoding="utf-8")
    folder = RunFolder(tmp_path / "runs" / trained.folder.path.name)
    summary, kind = folder.read_summary(), result_of(folder).name
    steps = summary["steps"]
    shutil.rmtree(result_of(folder))
    shutil.rmtree(folder.checkpoints / f"checkpoint-{steps}")
    folder.write_summary(summary | {"status": "stopped"})
    ended = go(tmp_path, *RUN, *KINDS[kind], "run.force=true")  # its data lie in another folder now
    assert f"after step {steps // 2}" in ended.stderr
    expected, found = (read_tensors(result_of(each)) for each in (trained.folder, folder))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- a chat model ---------------------------------------------------------------------------------------------------


def test_a_chat_model_goes_on_to_stop_and_keeps_its_template(shared_data: Path, tmp_path: Path) -> None:
    rows = read_rows(shared_data / "dolly_sample.jsonl")
    short = [chat(row["instruction"], row["response"]) for row in rows if not row["context"]]
    short = [row for row in short if sum(len(turn["content"]) for turn in row["messages"]) < 160][:16]
    assert len(short) == 16
    write_rows(tmp_path / "chats.jsonl", short)
    words = [word for word in RUN if not word.startswith(("data.chat_template=", "training.learning_rate="))]
    words += [f"model.name={smollm2()}", "lora.r=8", "lora.target_modules=[q_proj,v_proj]", "training.max_length=128"]
    words += ["training.learning_rate=1e-3", "training.max_steps=8", "training.save_strategy=no"]
    ended = go(tmp_path, *words)
    losses = [record["loss"] for record in ended.folder.read_metrics() if "loss" in record]
    assert sum(losses[-4:]) < sum(losses[:4]), "two epochs of four steps"
    model, tokenizer = distft.Run(ended.folder.path).load()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    said = model.generate(**asked, do_sample=False, max_new_tokens=60)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said) and tokenizer.decode(said[-1]) == "<|im_end|>"
    saved, base = (AutoTokenizer.from_pretrained(folder) for folder in (ended.folder.adapter, smollm2()))
    assert saved.chat_template == base.chat_template and saved.get_vocab() == base.get_vocab()
    assert base.convert_tokens_to_ids("<|im_end|>") in stops(ended.folder.adapter)
