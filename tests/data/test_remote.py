"""Data at addresses: fetched once, again when it changes, and every failure is one message without secrets."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from distft.config.recipe import load_recipe
from distft.config.schema import Data
from distft.data import remote
from distft.data.checks import data_file_faults
from distft.data.sources import data_sources, read_source
from distft.errors import DataError, RecipeError
from distft.hardware import describe
from distft.hub import missing
from distft.text import redacted
from distft.training.check import check_files
from tests.data.http_server import Server
from tests.data.rows import ALL, Prepare, recipe_of

QA = "data.format={prompt: q, completion: a}"
FORM = ("data.name=null", QA, *ALL)


def lines(*answers: str) -> bytes:
    return "".join(json.dumps({"q": "Which? ", "a": answer}) + "\n" for answer in answers).encode()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # concerns the hub alone
    found = Server()
    found.files = {
        "/d/one.jsonl": lines("one"),
        "/d/two.jsonl": lines("two"),
        "/d/README": b"no data",
        "/z/three.jsonl.gz": gzip.compress(lines("three")),
        "/z/four.jsonl.zst": pa.compress(lines("four"), codec="zstd", asbytes=True),
        "/x/five.csv": b"q,a\nWhich? ,five\n",
    }
    yield found
    found.close()


def read(**data: Any) -> list[str]:
    return [row["a"] for source in data_sources(Data(**data)) for row in read_source(source)]


def test_files_folders_and_patterns_at_an_address_are_read(server: Server) -> None:
    at = server.address
    assert read(name=f"{at}/d/two.jsonl") == ["two"]
    assert read(path=f"{at}/x/five.csv", name="mine") == ["five"]
    assert read(name=f"{at}/d") == read(name=f"{at}/d/") == ["one", "two"]
    assert read(name=f"{at}/z/three.jsonl.gz") == ["three"] and read(name=f"{at}/z/four.jsonl.zst") == ["four"]
    assert read(name=f"{at}/d/two.jsonl", test_path=f"{at}/d/one.jsonl") == ["two", "one"]
    assert read(files=[f"{at}/d/t*.jsonl", f"{at}/x/*"]) == ["two", "five"]
    assert read(name=f"{at}/d", files="o*") == ["one"]
    assert server.asked["GET /d/one.jsonl"] == 1, "to list files is not to fetch them"
    with pytest.raises(DataError, match="only the last part of an address can be a pattern"):
        read(files=f"{at}/*/one.jsonl")


def test_a_file_is_fetched_once_and_again_when_it_changes(server: Server) -> None:
    for _ in range(3):
        assert read(name=f"{server.address}/d/one.jsonl") == ["one"]
    assert server.asked["GET /d/one.jsonl"] == 1
    server.files["/d/one.jsonl"] = lines("two")  # of the same size
    assert read(name=f"{server.address}/d/one.jsonl") == ["two"]


def test_other_file_systems_are_read_through_fsspec(server: Server) -> None:
    for name in ("a", "b"):
        with fsspec.open(f"memory://remote/{name}.jsonl", "wb") as file:
            file.write(lines(name))
    assert read(name="memory://remote") == read(files="memory://remote/*.jsonl") == ["a", "b"]
    assert read(name="memory://remote/b.jsonl") == ["b"]


def test_those_that_arrive_together_fetch_once(server: Server) -> None:
    server.files["/d/one.jsonl"] = lines(*map(str, range(2_000)))
    wait = threading.Barrier(4)

    def arrive(_: int) -> int:
        wait.wait()
        return len(read(name=f"{server.address}/d/one.jsonl"))

    with ThreadPoolExecutor(4) as several:  # the lock is one of files, and so the same for processes
        assert list(several.map(arrive, range(4))) == [2_000] * 4
    assert server.asked["GET /d/one.jsonl"] == 1


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("{}/d/none.jsonl", "there is nothing at {}/d/none.jsonl"),
        ("{}/none", "there is nothing at {}/none"),
        ("{}/x/six.txt", "there is nothing at {}/x/six.txt"),
        ("{}/d/README", "{}/d/README has no .jsonl, .json"),
    ],
)
def test_what_is_not_there_is_one_message(server: Server, address: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(name=address.format(server.address))
    assert str(caught.value).startswith(problem.format(server.address))


def test_patterns_without_a_match_name_the_address(server: Server) -> None:
    with pytest.raises(DataError, match=rf"^{server.address}/d/x\*\.jsonl matches no \.jsonl"):
        read(files=f"{server.address}/d/x*.jsonl")


def test_a_broken_connection_is_tried_again_and_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    server.breaks = 1
    assert read(name=f"{server.address}/d/one.jsonl") == ["one"]
    server.breaks = 9
    with pytest.raises(DataError, match=rf"^{server.address}/d/two\.jsonl cannot be read: "):
        read(name=f"{server.address}/d/two.jsonl")
    assert [path.name for path in (tmp_path / "cache").rglob("*two*")] == []
    server.breaks = 0
    assert read(name=f"{server.address}/d/two.jsonl") == ["two"]


def test_without_a_connection_the_last_copy_is_used(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe([f"data.name={server.address}/d/one.jsonl", QA])
    assert any(
        line.startswith(f"the data {server.address}/d/one.jsonl is not in the cache") for line in missing(recipe)
    )
    assert read(name=f"{server.address}/d/one.jsonl") == ["one"]
    server.close()
    remote._tell.cache_clear()
    assert read(name=f"{server.address}/d/one.jsonl") == ["one"]
    assert "cannot be read: Cannot connect to host" in (told := capfd.readouterr().err) and "its copy of 2" in told
    assert missing(recipe) == []
    with pytest.raises(DataError, match=r"two\.jsonl cannot be read: Cannot connect to host"):
        read(name=f"{server.address}/d/two.jsonl")


def test_a_server_that_does_not_tell_versions_apart_is_refused(server: Server) -> None:
    server.tells = False
    with pytest.raises(
        DataError, match=r"the server gives neither ETag nor Last-Modified\n.*set data.path to the file"
    ):
        read(name=f"{server.address}/d/one.jsonl")


def test_secrets_are_used_and_never_shown_or_recorded(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.query = "X-Signature=hidden"
    plain = f"{server.address}/d/one.jsonl"
    signed = f"http://me:hidden@{server.host}/d/one.jsonl?{server.query}"
    assert redacted(f"data.name='{signed}'") == f"data.name='{plain}'"
    recipe = load_recipe([f"data.name={signed}", f"data.files=['{signed}']", QA])
    assert "hidden" not in recipe.to_yaml() and plain in recipe.to_yaml()
    monkeypatch.setattr("sys.argv", ["distft", f"data.name={signed}"])
    assert describe()["command"] == ["distft", f"data.name={plain}"]
    with pytest.raises(DataError, match="403") as caught:
        read(name=f"{signed}wrong")
    assert "hidden" not in str(caught.value) and "a signed address may have expired" in str(caught.value)
    assert read(name=signed) == ["one"]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and b"hidden" in path.read_bytes()]
    remote._tell.cache_clear()
    assert read(name=plain) == ["one"], "as the recorded recipe names it"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing://a/b.jsonl", "nothing://a/b.jsonl: nothing:// is no protocol that fsspec knows (use https://"),
        ("dropbox://a/b.jsonl", "reading dropbox:// needs a package that is not installed"),
    ],
)
def test_a_protocol_that_cannot_be_read_is_a_fault_before_anything_is_asked(name: str, problem: str) -> None:
    for key in ("data.name", "data.path", "data.test_path", "data.files"):
        with pytest.raises(RecipeError) as caught:
            recipe_of(f"{key}={name}", QA)
        assert f"{key}: " in str(caught.value) and problem in " ".join(str(caught.value).split())


def test_buckets_are_read_without_another_package(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    server.files = {f"/bucket/rows{name}": content for name, content in server.files.items()}
    assert read(name="s3://bucket/rows/d/two.jsonl") == ["two"]
    assert read(name="s3://bucket/rows/d") == read(files="s3://bucket/rows/d/*.jsonl") == ["one", "two"]
    assert server.asked["GET /bucket/rows/d/two.jsonl"] == 1
    assert read(name="s3://bucket/rows/z/four.jsonl.zst") == ["four"]
    with pytest.raises(DataError, match=r"^there is nothing at s3://bucket/rows/d/none\.jsonl$"):
        read(name="s3://bucket/rows/d/none.jsonl")
    server.query = "no request has this"
    with pytest.raises(DataError, match=r"^s3://bucket/rows/d/x\.jsonl cannot be read: .*ACCESS_DENIED.*\n +set AWS_"):
        read(name="s3://bucket/rows/d/x.jsonl")


def test_the_quick_check_asks_no_server(server: Server, tmp_path: Path) -> None:
    recipe = recipe_of(f"data.name={server.address}/d/none.jsonl", QA)
    assert data_file_faults(recipe) == [] and not server.asked
    found = check_files(recipe, tmp_path)
    assert found.skipped == (f"the data {server.address}/d/none.jsonl, which is at an address: --deep reads it",)


def test_what_is_prepared_depends_on_the_content_alone(server: Server, prepare: Prepare, tmp_path: Path) -> None:
    first = prepare(*FORM[1:], f"data.name={server.address}/d/one.jsonl")
    (tmp_path / "local.jsonl").write_bytes(server.files["/d/one.jsonl"])
    local = prepare(*FORM[1:], f"data.name={tmp_path}/local.jsonl")
    assert local.train.cache_files == first.train.cache_files
    server.files["/d/one.jsonl"] = lines("changed")
    assert prepare(*FORM[1:], f"data.name={server.address}/d/one.jsonl").report.digest != first.report.digest
