"""Names that may be a hub ID or a mistyped path, on a machine that cannot reach the hub: one message, at once."""

from __future__ import annotations

import socket

import pytest
from datasets import config as datasets_config
from huggingface_hub import constants
from transformers import AutoConfig

from distft.config.schema import Data, Format
from distft.connection import cache_if_unreachable
from distft.data.sources import data_sources, read_source
from distft.errors import DataError, ModelError
from distft.models.loading import from_pretrained


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A port on which nothing listens, which the hub's clients ask."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{number}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return number


def offline() -> tuple[bool, bool]:
    return constants.is_offline_mode(), datasets_config.HF_HUB_OFFLINE


def test_the_cache_is_used_for_as_long_as_the_hub_does_not_answer(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with cache_if_unreachable():
            assert offline() == (True, True)
    assert offline() == (False, False)
    assert capsys.readouterr().err.count(f"http://127.0.0.1:{port} cannot be reached ([Errno 111]") == 1
    with socket.create_server(("127.0.0.1", port)), cache_if_unreachable():
        assert offline() == (False, False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with cache_if_unreachable():
        assert offline() == (False, False), "a proxy may reach what this machine cannot"


@pytest.mark.parametrize("name", ["d/rows.txt", "data/chats"])
@pytest.mark.usefixtures("port")
def test_a_mistyped_path_is_read_both_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[object] = []
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", lambda *_, **__: requests.append(1))
    with pytest.raises(ModelError) as model:
        from_pretrained(AutoConfig, name, "model")
    (source,) = data_sources(Data(name=name, format=Format(text="text")))
    with pytest.raises(DataError) as data:
        read_source(source)
    assert f"there is no folder {name} here, and as a model of the hub" in str(model.value)
    assert f"there is no file or folder {name} here, and as a data set of the hub" in str(data.value)
    assert requests == []
