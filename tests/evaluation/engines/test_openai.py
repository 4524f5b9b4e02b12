"""A judge behind a server: requests, patience with a busy server, and a key that is written nowhere."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.config.evaluation import Judge
from distft.distributed.world import World
from distft.errors import JudgeError
from distft.evaluation.engines.openai import JudgeServer, unreachable
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Answer, Item, Sampling

KEY = "sk-this-is-a-secret"
Replay = Callable[..., Any]


def item(text: str, **sampling: Any) -> Item:
    return Item(({"role": "user", "content": text},), Sampling(16, **sampling))


def endpoint(address: str, **settings: Any) -> JudgeServer:
    return JudgeServer(Judge(endpoint=address, model="some-judge", **{"retries": 2, **settings}), World())


def answers(judge: JudgeServer, *items: Item) -> list[Answer]:
    found = dict(judge.write(items))
    return [found[index] for index in range(len(items))]


def test_a_real_server_writes_what_its_model_does(served: str, chat_model: Path) -> None:
    asked = [item("Tell me something."), item("What is a river?")]
    model = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    here = TransformersEngine(model, tokenizer, {}, batch_tokens=1_000, template="chat")
    expected = dict(here.write(asked))
    judge = JudgeServer(Judge(endpoint=served, model=str(chat_model)), World())
    assert answers(judge, *asked) == [expected[0], expected[1]]
    sampled = [item("Tell me something.", temperature=1.5, seed=seed) for seed in (1, 2)]
    one, two = (answers(judge, asked_one)[0].text for asked_one in sampled)
    assert one != two


def test_a_request_has_the_form_of_the_openai_api(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server = replay(lambda body, number: (200, "Fine. [RESULT] 4"))
    judge = endpoint(server.address + "/", api_key_env="MY_KEY")
    assert answers(judge, item("Grade this.", temperature=0.5, top_p=0.9)) == [Answer("Fine. [RESULT] 4", 3, True)]
    (body,) = server.bodies
    seed = body.pop("seed")
    assert isinstance(seed, int) and 0 <= seed < 2**31
    assert body == {
        "model": "some-judge",
        "messages": [{"role": "user", "content": "Grade this."}],
        "max_tokens": 16,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in str(judge.identity)


def test_without_a_key_none_is_sent(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = replay(lambda body, number: (200, "[RESULT] 4"))
    answers(endpoint(server.address), item("Grade this."))
    assert "Authorization" not in server.headers[0]


def test_a_text_that_hits_the_limit_is_not_finished(replay: Replay) -> None:
    choice = {"finish_reason": "length", "message": {"content": "Feedback: go\ud83d"}}
    server = replay(lambda body, number: {"choices": [choice]})
    assert answers(endpoint(server.address), item("Grade this.")) == [Answer("Feedback: go?", 0, False)]


TEXT = "Feedback: Good. [RESULT] 4"


@pytest.mark.parametrize(
    ("message", "ended", "text", "why"),
    [
        (
            {"content": [{"type": "text", "text": "Feedback: Good. "}, {"type": "text", "text": "[RESULT] 4"}]},
            "stop",
            TEXT,
            "",
        ),
        (
            {"content": [{"type": "thinking", "thinking": "[RESULT] 2"}, {"type": "text", "text": TEXT}]},
            "stop",
            TEXT,
            "",
        ),
        ({"content": TEXT, "reasoning_content": "[RESULT] 2"}, "stop", TEXT, ""),
        (
            {"content": None, "reasoning_content": TEXT},
            "stop",
            "",
            "the answer is in reasoning_content, and content is empty",
        ),
        ({"content": "", "reasoning": TEXT}, "length", "", "cut off in reasoning, and content is empty"),
        ({"reasoning_content": TEXT}, "stop", "", "the answer is in reasoning_content, and content is empty"),
        ({"content": [{"type": "thinking", "thinking": TEXT}]}, "stop", "", "the answer is in parts of type thinking"),
        ({"content": None, "refusal": "I can't\nhelp."}, "stop", "", "the judge refused: I can't help."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "stop", "", "the judge refused: No."),
        ({"content": None}, "content_filter", "", "withheld by the server's content filter"),
        ({"content": None}, "length", "", "cut off before any text"),
        ({"content": None}, "stop", "", ""),
    ],
)
def test_the_text_of_a_message_is_its_content(
    replay: Replay, message: dict[str, Any], ended: str, text: str, why: str
) -> None:
    server = replay(lambda body, number: {"choices": [{"message": message, "finish_reason": ended}]})
    (answer,) = answers(endpoint(server.address), item("Grade this."))
    assert (answer.text, answer.finished) == (text, ended == "stop")
    assert answer.why_empty.startswith(why) and bool(answer.why_empty) == bool(why)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_to_a_busy_server_is_retried(replay: Replay, status: int) -> None:
    says = lambda body, number: (status, "later") if number < 2 else (200, "[RESULT] 3")  # noqa: E731
    server = replay(says, reply_headers={"Retry-After": "0"})
    assert answers(endpoint(server.address), item("Grade this."))[0].text == "[RESULT] 3"
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[1] == server.bodies[2]


def test_a_server_that_stays_busy_is_an_error(replay: Replay) -> None:
    server = replay(lambda body, number: (503, "overloaded"), reply_headers={"Retry-After": "0"})
    with pytest.raises(JudgeError, match=r"did not answer in 3 attempts: 503 .*overloaded"):
        answers(endpoint(server.address), item("Grade this."))
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "rejected the request: 400"),
        (401, r"set the environment variable OPENAI_API_KEY"),
        (404, "usually ends in /v1"),
    ],
)
def test_a_rejection_is_final_and_does_not_repeat_the_key(
    replay: Replay, monkeypatch: pytest.MonkeyPatch, status: int, says: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = replay(lambda body, number: (status, f"Not for the key {KEY}, sorry"))
    with pytest.raises(JudgeError, match=says) as caught:
        answers(endpoint(server.address, concurrency=1), item("Grade this."), item("And this."))
    assert KEY not in str(caught.value)
    assert len(server.bodies) <= 2  # the first, and perhaps the next, which was already on its way


@pytest.mark.parametrize("answer", ["<html>Welcome</html>", '{"object": "list"}', '{"choices": []}', "[]"])
def test_another_kind_of_server_is_reported(replay: Replay, answer: str) -> None:
    server = replay(lambda body, number: (299, answer))  # sent as it is
    with pytest.raises(JudgeError, match="does not respond like an OpenAI-compatible server"):
        answers(endpoint(server.address), item("Grade this."))


def test_an_unreachable_server_is_reported_without_the_secrets_of_its_url() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        JudgeError, match=f"http://127.0.0.1:{port}/v1/chat/completions did not answer in 1 attempt:"
    ) as caught:
        answers(endpoint(f"http://me:hidden@127.0.0.1:{port}/v1", retries=0), item("Grade this."))
    assert "hidden" not in str(caught.value)


def test_whether_a_server_is_reachable_is_known_quickly(replay: Replay, served: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        port = busy.getsockname()[1]
        address = f"http://me:hidden@127.0.0.1:{port}/v1"
        (line,) = unreachable(Judge(endpoint=address))
        assert line.startswith(f"no server answers at http://127.0.0.1:{port}/v1/models (ConnectError")
        busy.listen()  # takes the request and says nothing: there, and slow
        assert unreachable(Judge(endpoint=address)) == []
    assert unreachable(Judge(endpoint=served)) == []
    server = replay(lambda body, number: (200, "[RESULT] 3"))  # has no list of models
    assert unreachable(Judge(endpoint=server.address)) == [] and not server.bodies
    assert unreachable(Judge(endpoint="http://127.0.0.1:port/v1"))[0].startswith("is not a URL")


def test_the_same_trouble_of_several_requests_is_said_once(replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    server = replay(lambda body, number: (503, "overloaded"), reply_headers={"Retry-After": "0"})
    with pytest.raises(JudgeError, match="in 4 attempts"):
        answers(endpoint(server.address, concurrency=4, retries=3), *(item(f"Text {number}") for number in range(4)))
    assert capsys.readouterr().err.count("overloaded; retrying in 0 s") == 1


def test_a_request_that_times_out_is_retried(replay: Replay) -> None:
    server = replay(lambda body, number: (200, "[RESULT] 3"), delay_s=3.0)
    with pytest.raises(JudgeError, match=r"in 2 attempts: no response \(ReadTimeout"):
        answers(endpoint(server.address, timeout_s=0.3, retries=1), item("Grade this."))
    assert len(server.bodies) == 2


def test_requests_under_way_are_limited(replay: Replay) -> None:
    server = replay(lambda body, number: (200, body["messages"][0]["content"]), delay_s=0.2)
    found = answers(endpoint(server.address, concurrency=3), *(item(f"Text {number}") for number in range(12)))
    assert [answer.text for answer in found] == [f"Text {number}" for number in range(12)]
    assert server.most_at_once == 3
