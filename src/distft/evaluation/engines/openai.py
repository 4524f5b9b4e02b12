"""Answers from an OpenAI-compatible server: vLLM, `transformers serve`, llama.cpp, or a provider.

The key is read from an environment variable and sent in the request's header. It is never written to a file or a
message.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from distft.config.evaluation import Judge
from distft.console import say
from distft.data.prompts import Message
from distft.distributed.world import World
from distft.errors import DistftError, JudgeError
from distft.evaluation.generate import Answer, Item, item_seed
from distft.text import count

_MAX_BACKOFF_S = 60.0
_MAX_RETRY_AFTER_S = 600.0
_CONNECT_S = 10.0
_PROBE_S = 3.0
_TOO_MANY_REQUESTS = 429
_TEXT = ("text", "output_text")
"""The types of the parts of a message that are its text."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields of a message in which servers put what the model reasons before it answers."""
_REPORTED_ATTEMPT = 2
"""Retries are reported from this attempt on: trouble that passes by itself is no news."""


def unreachable(judge: Judge) -> list[str]:
    """Why no request would reach `judge.endpoint`, in at most one line.

    The server is asked once for its list of models. Any response counts as reachable, and so does a server that
    accepts the connection but takes long to respond.
    """
    try:
        url = httpx.URL((judge.endpoint or "").rstrip("/") + "/models")
    except httpx.InvalidURL as error:
        return [f"is not a URL: {error}"]
    try:
        httpx.get(url, headers=_headers(_key(judge)), timeout=_PROBE_S)
    except httpx.ReadTimeout:
        return []
    except httpx.HTTPError as error:
        return [f"no server answers at {without_secrets(url)} ({type(error).__name__}: {error})"]
    return []


def without_secrets(url: httpx.URL) -> httpx.URL:
    """The URL without user name and password."""
    return url.copy_with(userinfo=b"")


@dataclass
class Client:
    """POSTs completion requests to `url`, up to `concurrency` at once, and retries those that fail for the moment."""

    url: httpx.URL
    name: str
    """The server in messages, such as `the judge at http://…`."""
    error: type[DistftError]
    """What is raised if a request fails for good."""
    concurrency: int
    retries: int
    timeout_s: float
    key: str | None = None
    remedy: str = ""
    """Ends the message after the last retry."""
    remedy_for: Callable[[int], str] = lambda status: ""
    """Ends the message if the server rejects a request, by HTTP status."""
    trust_env: bool = True
    """Use the proxies that the environment names."""
    _speaking: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _last_said: str = field(default="", repr=False)

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Answer]]:
        """The index of each request with its answer, in the order in which they arrive.

        Raises:
            DistftError: an `error`: the server cannot be reached, rejects a request, or does not respond as expected.
        """
        if not bodies:
            return
        stop = threading.Event()
        client = httpx.Client(
            headers=_headers(self.key),
            timeout=httpx.Timeout(self.timeout_s, connect=min(_CONNECT_S, self.timeout_s), pool=None),
            limits=httpx.Limits(max_connections=self.concurrency),
            trust_env=self.trust_env,
        )
        with client, ThreadPoolExecutor(self.concurrency) as pool:
            requests = {pool.submit(self._post, client, body, stop): index for index, body in enumerate(bodies)}
            try:
                for future in as_completed(requests):
                    yield requests[future], future.result()
            finally:  # after a failure, or if the caller stops early, no request waits for its next retry
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _post(self, client: httpx.Client, body: Mapping[str, Any], stop: threading.Event) -> Answer:
        for attempt in range(self.retries + 1):
            retry_after = None
            try:
                response = client.post(self.url, json=body)
            except httpx.TransportError as error:
                problem = f"no response ({type(error).__name__}: {error})"
            except httpx.HTTPError as error:
                raise self.error(f"the request to {self.name} failed: {error}") from error
            else:
                if response.is_success:
                    return self._answer(response)
                problem = f"{response.status_code} {response.reason_phrase}: {self._excerpt(response)}"
                if response.status_code != _TOO_MANY_REQUESTS and response.status_code < 500:
                    remedy = self.remedy_for(response.status_code)
                    raise self.error(f"{self.name} rejected the request: {problem}{remedy}")
                retry_after = _retry_after(response)
            if attempt < self.retries:
                wait = min(2.0**attempt, _MAX_BACKOFF_S) if retry_after is None else retry_after
                if attempt == _REPORTED_ATTEMPT:
                    self._say(f"{self.name}: {problem}; retrying in {wait:.0f} s")
                if stop.wait(wait):
                    break
        attempts = count(self.retries + 1, "attempt")
        raise self.error(f"{self.name} did not answer in {attempts}: {problem}{self.remedy}")

    def _say(self, line: str) -> None:
        """Say it once: all threads meet the same trouble at the same time."""
        with self._speaking:
            if line != self._last_said:
                say(line)
            self._last_said = line

    def _answer(self, response: httpx.Response) -> Answer:
        try:
            record = response.json()
            choice = record["choices"][0]
            text, why_empty = read_message(choice["message"], choice) if "message" in choice else (choice["text"], "")
            tokens = int((record.get("usage") or {}).get("completion_tokens") or 0)
            # JSON can hold a lone surrogate, which UTF-8 cannot.
            return Answer(str(text or "").encode("utf-8", "replace").decode(), tokens, _ended(choice), why_empty)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            address, excerpt = without_secrets(self.url), self._excerpt(response)
            raise self.error(f"{address} does not respond like an OpenAI-compatible server: {excerpt}") from error

    def _excerpt(self, response: httpx.Response) -> str:
        """The beginning of the response, without the key, which some servers repeat."""
        text = " ".join(response.text.split())
        return (text.replace(self.key, "…") if self.key else text)[:300]


def read_message(message: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[str, str]:
    """The text of an assistant's message and, if there is none, why: "" if unknown.

    The text is `content`: a string, or a list of parts, of which those of type text are joined. Reasoning, which
    servers put into a field or into parts of its own, is not part of it.

    Raises:
        KeyError: the message has neither `content` nor a field that takes its place.
    """
    reasoning = next((key for key in _REASONING if message.get(key)), None)
    content = message["content"] if not (reasoning or message.get("refusal")) else message.get("content")
    refusal = str(message.get("refusal") or "")
    if isinstance(content, list):
        kinds = [part.get("type", "") if isinstance(part, Mapping) else "text" for part in content]
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [str(part) for kind, part in zip(kinds, parts, strict=True) if kind in _TEXT and part]
        refusal = refusal or next((part["refusal"] for part in content if "refusal" in part), "")
        reasoning = reasoning or next((f"parts of type {kind}" for kind in kinds if kind not in _TEXT), None)
        content = "".join(texts)
    text = str(content or "")
    if text.strip():
        return text, ""
    if refusal:
        return "", f"the judge refused: {' '.join(str(refusal).split())[:80]}"
    if choice.get("finish_reason") == "content_filter":
        return "", "withheld by the server's content filter"
    if reasoning:
        cut = "the answer is in" if _ended(choice) else "cut off in"
        return "", f"{cut} {reasoning}, and content is empty"
    return "", "" if _ended(choice) else "cut off before any text"


def _ended(choice: Mapping[str, Any]) -> bool:
    """Whether the text ended by itself, as opposed to at a limit or by the server."""
    return str(choice.get("finish_reason")).lower() not in ("length", "max_tokens", "content_filter", "abort", "error")


class JudgeServer:
    """A judge behind `{endpoint}/chat/completions`. `judge.concurrency` is shared by all processes."""

    def __init__(self, judge: Judge, world: World) -> None:
        assert judge.endpoint is not None
        self.judge = judge
        url = httpx.URL(judge.endpoint.rstrip("/") + "/chat/completions")
        self.address = str(without_secrets(url))
        self._client = Client(
            url,
            f"the judge at {self.address}",
            JudgeError,
            concurrency=max(1, judge.concurrency // world.world_size),
            retries=judge.retries,
            timeout_s=judge.timeout_s,
            key=_key(judge),
            remedy=(
                "; is the server up, and is evaluation.judge.endpoint its base URL (http://HOST:PORT/v1)? Finished "
                "judgements are kept: run the same command to continue"
            ),
            remedy_for=self._remedy_for,
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        """Without the address: the same model elsewhere gives the same judgement."""
        return {"engine": "endpoint", "model": self.judge.model, "revision": self.judge.revision}

    def prompt(self, messages: Sequence[Message]) -> str:
        """A single user turn as it is, a conversation as JSON: only the server knows the template."""
        return messages[0]["content"] if len(messages) == 1 else json.dumps(messages)

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Answer]]:
        """Raises:
        JudgeError: the server cannot be reached, rejects a request, or does not respond as expected.
        """
        return self._client.complete([self._body(item) for item in items])

    def _body(self, item: Item) -> dict[str, Any]:
        sampling = item.sampling
        body: dict[str, Any] = {
            "model": self.judge.model,
            "messages": list(item.messages),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": item_seed(sampling, self.prompt(item.messages)),
        }
        if sampling.temperature > 0 and sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        return body

    def _remedy_for(self, status: int) -> str:
        if status in (401, 403):
            known = "the key was not accepted" if _key(self.judge) else "no key was sent"
            return f" ({known}: set the environment variable {self.judge.api_key_env})"
        if status == 404:
            return (
                " (evaluation.judge.endpoint must be the base URL, which usually ends in /v1, and "
                "evaluation.judge.model a name that the server knows)"
            )
        return ""


def _key(judge: Judge) -> str | None:
    return os.environ.get(judge.api_key_env) or None


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _retry_after(response: httpx.Response) -> float | None:
    """The Retry-After header in seconds; it is a number or a date."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S)
