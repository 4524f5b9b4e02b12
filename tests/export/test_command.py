"""`distft export` as a user calls it: forms, files, cards, exit codes, refusals."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from distft.cli.main import main
from distft.config.recipe import Recipe
from distft.errors import ModelError
from distft.export import run as export_run
from distft.export.adapters import obstacle, vllm_command
from distft.export.push import push
from distft.runs.folder import RunFolder


@pytest.fixture
def mine(handed: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(handed.path, tmp_path / "chat")
    return RunFolder(tmp_path / "chat")


def test_merged_weights_come_with_a_card_and_the_proof(mine: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0o022)
    try:
        assert main(["export", str(mine.path), "--to", "merged", "--rows", "3"]) == 0
    finally:
        os.umask(before)
    folder = mine.export / "merged"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "chat_template.jinja", "config.json", "export.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    printed = capsys.readouterr().out
    assert "3 rows of the split test in transformers" in printed
    assert "template   passed  equal in 3 prompts" in printed
    record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert record["proof"]["passed"] is True and record["merge"] == "tensor by tensor"
    assert record["proof"]["stages"]["merge"]["equal"] is True
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "It passed." in card.text and "| merge | passed | equal | equal |" in card.text
    assert all(f"- {engine}: `" in card.text for engine in ("distft", "vLLM", "llama.cpp"))

    assert main(["export", str(mine.path), "--to", "merged"]) == 2
    assert "already exists and will not be overwritten" in capsys.readouterr().err


def test_a_broken_export_ends_with_1_and_is_not_pushed(
    mine: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_run.write_merged

    def wrong(recipe: Recipe, result: Path, target: Path) -> str:
        made = real(recipe, result, target)
        (target / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
        return made

    monkeypatch.setattr(export_run, "write_merged", wrong)
    assert main(["export", str(mine.path), "--to", "merged", "--rows", "2", "--push", "me/mine"]) == 1
    told = capsys.readouterr().err
    assert "the proof failed at the stage template: row 1" in told and "me/mine was not written" in told
    record = json.loads((mine.export / "merged" / "export.json").read_text(encoding="utf-8"))
    assert record["proof"]["broken"] == "template"
    assert "It failed at the stage template." in (mine.export / "merged" / "README.md").read_text(encoding="utf-8")


def test_adapters_are_copied_where_servers_load_them(mine: RunFolder, recipe: Recipe) -> None:
    assert main(["export", str(mine.path), "--to", "vllm"]) == 0
    folder = mine.export / "vllm"
    assert (folder / "adapter_model.safetensors").is_file() and (folder / "chat_template.jinja").is_file()
    record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert record["proof"] is None
    assert record["command"] == (
        f"vllm serve tiny --dtype float32 --enable-lora --max-lora-rank 8 --lora-modules chat={folder}"
    )
    packed = recipe.model_copy(update={"quantization": None})
    assert vllm_command(packed, "chat", Path("there"), None) == (
        "vllm serve there --served-model-name chat --dtype float32"
    )


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"use_dora": True}, "vLLM does not support adapters with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "vLLM does not support adapters with modules_to_save"),
        ({"bias": "all"}, "vLLM leaves the base's weights as they are"),
        ({"r": 512}, "vLLM supports adapters up to rank 256"),
        ({"peft_type": "IA3"}, "vLLM does not support adapters of the type IA3"),
        ({}, None),
    ],
)
def test_adapters_that_servers_do_not_load(settings: dict[str, Any], what: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | settings))
    found = obstacle(tmp_path)
    assert found is None if what is None else found is not None and found.startswith(what)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "merged", "--quantize", "q8_0"], "--quantize is for --to gguf and ollama"),
        (["--to", "gguf", "--quantize", "q3"], "--quantize q3 is not one of f16, bf16, q8_0"),
        (["--to", "merged", "--quantize", "nf4"], "quantise merged weights while they load them"),
        (["--to", "merged", "--rows", "0"], "needs at least one row"),
        (["--to", "merged", "--public"], "name the repository"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    words: list[str], message: str, handed: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(handed.path), *words]) == 2
    assert message in capsys.readouterr().err
    assert main(["export", str(handed.path / "nowhere"), *words[:2]]) == 2


def test_a_push_asks_for_a_private_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server that records what is asked, and refuses."""
    asked: list[dict[str, Any]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            asked.append({"path": self.path, **json.loads(self.rfile.read(size))})
            self.send_response(403)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    import huggingface_hub

    class Local(huggingface_hub.HfApi):
        def __init__(self) -> None:
            super().__init__(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_none")

    monkeypatch.setattr(huggingface_hub, "HfApi", Local)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for private in (True, False):
        with pytest.raises(ModelError, match=r"cannot push to me/mine: .*stays here"):
            push(tmp_path, "me/mine", private=private)
    server.shutdown()
    assert [each["path"] for each in asked] == ["/api/repos/create"] * 2
    assert asked[0].get("private", asked[0].get("visibility")) in (True, "private")
    assert asked[0]["name"] == "mine" and asked[0] != asked[1]
