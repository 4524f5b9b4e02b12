"""Model and data come from a hub on loopback into a cache of their own, and a run without a connection finds them
there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.config.recipe import load_recipe
from distft.hub import missing
from distft.models.digest import digest
from distft.paths import packaged

from .distributed.conftest import Ended, finish, start

COMMIT = "0123456789" * 4
MODEL, DATA, GATED = "org/shards", "org/rows", "org/gated"
WORDS = (
    "recipe=tiny",
    f"model.name={MODEL}",
    f"data.name={DATA}",
    "data.format.instruction=instruction",
    "data.format.context=context",
    "data.format.response=response",
)


class Hub(ThreadingHTTPServer):
    """As much of the hub as its clients ask for: what there is of a repository, and its files. Notes every request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:  # paths-info
        self._body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        asked = re.fullmatch(
            r"/api/(?:models|datasets)/(org/\w+)(?:/(revision|tree|paths-info)/([^/]+))?(?:/.*)?", path
        )
        file = re.fullmatch(r"/(?:datasets/)?(org/\w+)/resolve/[^/]+/(.+)", path)
        name = (asked or file or [None, "nobody"])[1]
        repository = self.server.folder / name
        if not repository.is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif asked:
            files = [self._entry(repository, item) for item in sorted(repository.iterdir())]
            if asked[2] == "paths-info":
                wanted = re.findall(rb"[\w.-]+", self._body)
                files = [entry for entry in files if entry["path"].encode() in wanted]
            info = {
                "id": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": entry["path"]} for entry in files],
                "tags": [],
            }
            self._answer(200, json.dumps(files if asked[2] in ("tree", "paths-info") else info).encode())
        elif file and name == GATED:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif file and (repository / file[2]).is_file():
            content = (repository / file[2]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _entry(self, repository: Path, file: Path) -> dict[str, Any]:
        return {
            "type": "file",
            "path": file.name,
            "size": file.stat().st_size,
            "oid": hashlib.sha256(file.read_bytes()).hexdigest()[:40],
        }

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder / MODEL, max_shard_size="4MB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / MODEL)
    (folder / MODEL / "pytorch_model.bin").write_bytes(b"a pickle")
    for name in (DATA, GATED):
        (folder / name).mkdir()
    shutil.copy(packaged("assets/tiny_instructions.jsonl"), folder / DATA / "train.jsonl")
    (folder / GATED / "config.json").write_text("{}")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the caches of these tests in it."""
    return tmp_path_factory.mktemp("here")


def distft(here: Path, hub: Hub, *words: str, **changes: str) -> Ended:
    home = str(here / "hf")
    caches = {
        "HF_HOME": home,
        "HF_DATASETS_CACHE": f"{home}/datasets",
        "DISTFT_CACHE": str(here / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "distft.cli", *words]
    return finish(
        start(command, here, **{**caches, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", **changes}), here
    )


def snapshot(here: Path) -> Path:
    return here / "hf" / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT


def test_what_is_missing_is_found_without_the_network(here: Path, hub: Hub) -> None:
    ended = distft(here, hub, "fetch", "--check", *WORDS)
    assert ended.code == 2, ended.stderr
    assert f"the model and tokenizer {MODEL} is not in the cache" in ended.stdout
    assert f"the data {DATA}, train split, is not in the cache" in ended.stdout
    assert ended.stdout.count("distft fetch recipe=tiny") == 2
    assert hub.requests == []


@pytest.fixture(scope="module")
def fetched(here: Path, hub: Hub) -> Ended:
    """`distft fetch`, which brings model and data."""
    ended = distft(here, hub, "fetch", *WORDS)
    assert ended.code == 0, ended.stderr[-3000:]
    return ended


def test_a_run_offline_finds_what_was_fetched(here: Path, hub: Hub, fetched: Ended, tiny: Path) -> None:
    assert str(snapshot(here)) in fetched.stdout
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]
    assert len(list(snapshot(here).glob("*.safetensors"))) > 1, "it comes in shards"
    prepared = sorted((here / "cache" / "data").glob("*/report.json"))

    asked = len(hub.requests)
    ended = distft(here, hub, "fetch", "--check", *WORDS)
    assert (ended.code, ended.stdout.startswith("nothing is missing")) == (0, True), ended.stdout + ended.stderr
    steps = (
        "training.max_steps=2",
        "evaluation.before_and_after=false",
        "tracking.report_to=[]",
        "training.eval_strategy=no",
    )
    ended = distft(here, hub, "train", *WORDS, *steps, "--nproc", "1", HF_HUB_OFFLINE="1")
    assert ended.code == 0, ended.stderr[-3000:]
    summary = ended.folder.read_summary()
    assert (summary["steps"], summary["weights_digest"]) == (2, digest(str(tiny)))
    assert hub.requests[asked:] == [], "neither has asked the hub"
    assert sorted((here / "cache" / "data").glob("*/report.json")) == prepared, "the tokenized data was found as well"


@pytest.mark.usefixtures("fetched")
def test_a_shard_that_is_gone_is_named(here: Path, hub: Hub) -> None:
    first, second, *_ = sorted(snapshot(here).glob("*.safetensors"))
    first.unlink()
    second.resolve().unlink()
    ended = distft(here, hub, "fetch", "--check", *WORDS)
    assert ended.code == 2
    assert ended.stdout.count("\n") == 2
    for name in (first.name, second.name):
        assert (
            f"{MODEL} lacks {name} in {snapshot(here)}; on a machine with a connection: distft fetch recipe=tiny"
            in ended.stdout
        )
    assert distft(here, hub, "fetch", *WORDS).code == 0
    assert distft(here, hub, "fetch", "--check", *WORDS).code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["model.name=/nowhere/model", "data.path=no.jsonl"],
            ["no folder /nowhere/model", "no data file or folder no.jsonl"],
        ),
        (
            ["model.name=half"],
            [
                "half lacks config.json in half; copy the complete folder",
                "half lacks model.safetensors",
                "half lacks tokenizer.json",
            ],
        ),
        (["model.tokenizer=org/other"], ["the tokenizer org/other is not in the cache"]),
    ],
    ids=lambda value: value[0],
)
def test_each_gap_has_a_line(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half").mkdir()
    expected = [text.replace("half", str(tmp_path / "half")) for text in expected]
    for line, text in zip(missing(load_recipe(["recipe=tiny", *words])), expected, strict=True):
        assert text in line


@pytest.mark.parametrize(
    ("words", "changes", "expected"),
    [
        ([f"model.name={GATED}"], {}, "org/gated is gated: accept its licence"),
        (["model.name=org/nothing"], {}, "the hub has no model org/nothing, or it is private"),
        (
            ["model.name=org/other"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "org/other cannot be downloaded from the hub: [Errno 111]",
        ),
        ([f"model.name={DATA}"], {}, "has no config.json and no model.safetensors and no tokenizer.json"),
        (
            ["data.name=org/nothing", "data.format.text=text"],
            {},
            "org/nothing (train split) is not in the cache and could not be downloaded",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_unavailable_is_reported_in_one_message(
    words: list[str], changes: dict[str, str], expected: str, here: Path, hub: Hub, tiny: Path
) -> None:
    ended = distft(here, hub, "fetch", "recipe=tiny", *words, **{"DISTFT_CACHE": str(tiny.parent), **changes})
    assert ended.code == 2, ended.stderr
    assert expected in ended.stderr
    assert len([line for line in ended.stderr.splitlines() if line.startswith("distft: ")]) == 1
    assert "Traceback" not in ended.stderr


def test_the_embedded_recipe_needs_no_hub(here: Path, hub: Hub, tiny: Path) -> None:
    for words in (("fetch", "recipe=tiny"), ("fetch", "--check", "recipe=tiny")):
        ended = distft(here, hub, *words, HF_HUB_OFFLINE="1", DISTFT_CACHE=str(tiny.parent))
        assert ended.code == 0, ended.stderr
    assert "nothing is missing" in ended.stdout


def test_the_judge_and_the_documents_of_tasks_are_brought_as_well(tmp_path: Path, hub: Hub, tiny: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([{"instruction": "Name one thing.", "output": "One."}]))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.yaml").write_text(
        f"task: rows\ndataset_path: {DATA}\ntest_split: train\noutput_type: multiple_choice\n"
        "doc_to_text: '{{instruction}}'\n"
        "doc_to_choice: ['yes', 'no']\ndoc_to_target: 0\nmetric_list:\n  - {metric: acc}\n"
    )
    words = (
        "recipe=tiny",
        "evaluation.tasks=[alpaca,lm_eval]",
        "evaluation.alpaca.path=pairs.json",
        f"evaluation.judge={MODEL}",
        "evaluation.lm_eval.tasks=[rows]",
        "evaluation.lm_eval.include_path=tasks",
    )
    cache = {"DISTFT_CACHE": str(tiny.parent)}
    asked = len(hub.requests)
    ended = distft(tmp_path, hub, "fetch", "--check", *words, **cache)
    assert ended.code == 2, ended.stderr
    judge, documents = ended.stdout.splitlines()
    assert judge.startswith(
        f"the model and tokenizer {MODEL} (the judge) is not in the cache; on a machine with a connection: distft fetch"
    )
    assert documents.startswith("a task of rows cannot be loaded: ") and "distft fetch recipe=tiny" in documents
    assert hub.requests[asked:] == []

    ended = distft(tmp_path, hub, "fetch", *words, **cache)
    assert ended.code == 0, ended.stderr[-3000:]
    assert f"model and tokenizer {MODEL} (the judge): {snapshot(tmp_path)}" in ended.stdout
    asked = len(hub.requests)
    ended = distft(tmp_path, hub, "fetch", "--check", *words, **cache)
    assert (ended.code, ended.stdout.startswith("nothing is missing")) == (0, True), ended.stdout + ended.stderr
    assert hub.requests[asked:] == []
