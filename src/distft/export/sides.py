"""A model and its tokenizer in transformers, as one side of a proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.data.prompts import token_ids
from distft.export.distance import Predictions
from distft.export.replay import Replay
from distft.models.generation import end_tokens

KEPT = 512
"""The likeliest tokens that are compared at each position."""


class Side(Protocol):
    """What a proof asks of a program with a model loaded."""

    @property
    def begins(self) -> str:
        """The text of the token that the program puts before prompts by itself, which `render` then lacks."""
        ...

    def render(self, item: Replay) -> str | None:
        """The prompt of a conversation as text; None if the program cannot tell."""
        ...

    def ids(self, text: str, *, chat: bool) -> list[int]:
        """The tokens of a prompt as the program feeds them to the model."""
        ...

    def stops(self) -> set[int] | None:
        """The tokens at which answers end; None if the program cannot tell."""
        ...

    def predictions(self, items: Sequence[Replay]) -> list[Predictions]: ...

    def continuations(self, items: Sequence[Replay], tokens: int) -> list[list[int]]:
        """The greedy continuation of each opening, of at most `tokens` tokens, up to the one that ends it."""
        ...


@dataclass(frozen=True)
class TransformersSide:
    """A model in this process."""

    model: Any
    tokenizer: Any
    begins: str = ""

    @classmethod
    def load(cls, folder: Path, *, trust_remote_code: bool = False) -> TransformersSide:
        device_map = {"": 0} if torch.cuda.is_available() else None
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", device_map=device_map, trust_remote_code=trust_remote_code
        )
        return cls(model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))

    def render(self, item: Replay) -> str | None:
        return render(self.tokenizer, item)

    def ids(self, text: str, *, chat: bool) -> list[int]:
        return token_ids(self.tokenizer, "chat" if chat else "plain", text)

    def stops(self) -> set[int]:
        return set(end_tokens(self.model, self.tokenizer))

    @torch.inference_mode()
    def predictions(self, items: Sequence[Replay]) -> list[Predictions]:
        found = []
        for item in items:
            ids = torch.tensor([item.ids], device=self._device)
            places = torch.tensor(item.trained, device=self._device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, places - 1].float()
            logs = logits.log_softmax(-1)
            likeliest = logs.topk(min(KEPT, logs.shape[-1]))
            reference = logs.gather(1, ids[0, places][:, None])[:, 0]
            found.append(
                Predictions(
                    likeliest.indices.cpu().numpy(),
                    likeliest.values.double().cpu().numpy(),
                    reference.double().cpu().numpy(),
                )
            )
        return found

    @torch.inference_mode()
    def continuations(self, items: Sequence[Replay], tokens: int) -> list[list[int]]:
        stops = self.stops()
        return [self._continuation(item.opening, tokens, stops) for item in items]

    def _continuation(self, opening: list[int], tokens: int, stops: set[int]) -> list[int]:
        fed, cache, written = torch.tensor([opening], device=self._device), None, list[int]()
        while len(written) < tokens and not (written and written[-1] in stops):
            output = self.model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            written.append(int(output.logits[0, -1].argmax()))
            fed = torch.tensor([written[-1:]], device=self._device)
        return written

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


def render(tokenizer: Any, item: Replay) -> str:
    """A conversation by the tokenizer's chat template, up to where the assistant is to speak."""
    return str(
        tokenizer.apply_chat_template(item.messages, tools=item.tools, tokenize=False, add_generation_prompt=True)
    )


def as_predictions(rows: list[tuple[list[int], list[float], float]]) -> Predictions:
    """Predictions from the lists of a server, which may have fewer tokens at some positions."""
    size = min(len(tokens) for tokens, _, _ in rows)
    return Predictions(
        np.array([tokens[:size] for tokens, _, _ in rows], dtype=np.int64),
        np.array([logs[:size] for _, logs, _ in rows], dtype=np.float64),
        np.array([reference for _, _, reference in rows], dtype=np.float64),
    )
