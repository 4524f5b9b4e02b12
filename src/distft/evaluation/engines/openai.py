"""Answers of a model behind an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, or a provider.

The key comes from an environment variable and goes into the request's header; it is written nowhere.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from distft.config.evaluation import Judge
from distft.console import say
from distft.distributed.world import World
from distft.errors import JudgeError
from distft.evaluation.generate import Answer, Item, Message, item_seed

_LONGEST_WAIT_S = 60.0
_CONNECT_S = 10.0
_LOOK_S = 3.0
"""How long a server may take to show that it is there."""
_BUSY = 429


def unreachable(judge: Judge) -> list[str]:
    """In a line why no request would reach `judge.endpoint`; none where something answers there, whatever it says, or takes longer.

    It is asked once for its list of models.
    """
    try:
        url = httpx.URL((judge.endpoint or "").rstrip("/") + "/models")
    except httpx.InvalidURL as error:
        return [f"is no address: {error}"]
    try:
        httpx.get(url, headers=_headers(judge), timeout=_LOOK_S)
    except httpx.ReadTimeout:
        return []
    except httpx.HTTPError as error:
        return [f"no server answers at {without_secrets(url)} ({type(error).__name__}: {error})"]
    return []


def without_secrets(url: httpx.URL) -> httpx.URL:
    """As it may be shown: what stands before an @ is a secret."""
    return url.copy_with(userinfo=b"")


class Endpoint:
    """`POST {endpoint}/chat/completions`, with up to `concurrency` requests under way at once over all processes."""

    def __init__(self, judge: Judge, world: World) -> None:
        assert judge.endpoint is not None
        self.judge = judge
        self.url = httpx.URL(judge.endpoint.rstrip("/") + "/chat/completions")
        self.shown = str(without_secrets(self.url))
        self.threads = max(1, judge.concurrency // world.world_size)
        self._speaking, self._said = threading.Lock(), ""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The address is no part of it: the same model elsewhere gives the same judgement."""
        return {"engine": "endpoint", "model": self.judge.model, "revision": self.judge.revision}

    def prompt(self, messages: Sequence[Message]) -> str:
        """One user's turn as it is, a conversation as JSON: the server knows the template."""
        return messages[0]["content"] if len(messages) == 1 else json.dumps(messages)

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Raises:
        JudgeError: the server cannot be reached, refuses, or answers something else.
        """
        if not items:
            return
        headers = _headers(self.judge)
        timeout = httpx.Timeout(self.judge.timeout_s, connect=min(_CONNECT_S, self.judge.timeout_s))
        over = threading.Event()
        with httpx.Client(headers=headers, timeout=timeout) as client, ThreadPoolExecutor(self.threads) as pool:
            asked = {pool.submit(self._ask, client, item, over): index for index, item in enumerate(items)}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            finally:  # one has failed, or nobody wants the rest: no request waits for its next try
                over.set()
                pool.shutdown(cancel_futures=True)

    def _ask(self, client: httpx.Client, item: Item, over: threading.Event) -> Answer:
        sampling = item.sampling
        body: dict[str, Any] = {
            "model": self.judge.model, "messages": list(item.messages), "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature, "seed": item_seed(sampling, self.prompt(item.messages)),
        }  # fmt: skip
        if sampling.temperature > 0 and sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        for attempt in range(self.judge.retries + 1):
            asked_to_wait = None
            try:
                response = client.post(self.url, json=body)
            except httpx.TransportError as error:
                problem = f"no answer ({type(error).__name__}: {error})"
            except httpx.HTTPError as error:
                raise JudgeError(f"the judge at {self.shown} cannot be asked: {error}") from error
            else:
                if response.is_success:
                    return self._answer(response)
                problem = f"{response.status_code} {response.reason_phrase}: {self._start(response)}"
                if response.status_code != _BUSY and response.status_code < 500:
                    raise JudgeError(
                        f"the judge at {self.shown} refuses: {problem}{self._remedy(response.status_code)}"
                    )
                asked_to_wait = _retry_after(response)
            if attempt < self.judge.retries:
                wait = min(2.0**attempt, _LONGEST_WAIT_S) if asked_to_wait is None else asked_to_wait
                if attempt == 2:  # one that passes by itself is no news
                    self._say(f"the judge at {self.shown}: {problem}; asked again in {wait:.0f} s")
                if over.wait(wait):
                    break
        tried = "once" if self.judge.retries == 0 else f"{self.judge.retries + 1} times"
        raise JudgeError(
            f"the judge at {self.shown} does not judge, tried {tried}: {problem}; is the server up, and is "
            "evaluation.judge.endpoint its base URL (http://HOST:PORT/v1)? What is judged is kept: start again to go on"
        )

    def _say(self, line: str) -> None:
        """Once, for the threads meet the same trouble together."""
        with self._speaking:
            if line != self._said:
                say(line)
            self._said = line

    def _answer(self, response: httpx.Response) -> Answer:
        try:
            record = response.json()
            choice = record["choices"][0]
            text = choice["message"]["content"] or ""
            tokens = (record.get("usage") or {}).get("completion_tokens") or 0
            # A lone surrogate is JSON, but no text that can be written.
            return Answer(
                str(text).encode("utf-8", "replace").decode(), int(tokens), choice.get("finish_reason") != "length"
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise JudgeError(
                f"{self.shown} does not answer as an OpenAI-compatible server does: {self._start(response)}"
            ) from error

    def _start(self, response: httpx.Response) -> str:
        """The beginning of what the server says; some repeat the key."""
        key, text = _key(self.judge), " ".join(response.text.split())
        return (text.replace(key, "…") if key else text)[:300]

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            known = "its key is not accepted" if _key(self.judge) else "no key was sent"
            return f" ({known}: set the environment variable {self.judge.api_key_env})"
        if status == 404:
            return " (evaluation.judge.endpoint is the base URL, which mostly ends in /v1; evaluation.judge.model is a name that the server knows)"
        return ""


def _key(judge: Judge) -> str | None:
    return os.environ.get(judge.api_key_env) or None


def _headers(judge: Judge) -> dict[str, str]:
    key = _key(judge)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), 10 * _LONGEST_WAIT_S)
