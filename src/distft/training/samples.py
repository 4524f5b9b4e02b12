"""Held-out prompts that the model answers before and after training and, if asked, in each evaluation.

Every rank gives the same prompts to the model, so that those that hold a part of its weights reach each other's
collectives; rank 0 keeps the answers. Decoding is greedy: nothing is drawn, so training goes on as without it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from distft.config.recipe import Recipe
from distft.data.formats import format_of, is_chat
from distft.data.sources import parts_of
from distft.data.templates import format_dolly, format_review
from distft.data.tokenize import IGNORED
from distft.distributed.collectives import together
from distft.distributed.strategies import Strategy
from distft.errors import Fault
from distft.models.generation import end_tokens, write
from distft.runs.folder import RunFolder
from distft.runs.samples import Answers, Samples

if TYPE_CHECKING:
    from distft.training.metrics import Telemetry
    from distft.training.trainer import Trainer

_BEGINNING = 32
"""Tokens at the beginning of a whole text that serve as a prompt."""
_QUESTION = "?question?"


def marks_of(recipe: Recipe, tokenizer: Any) -> list[str]:
    """What the templates of the recipe's data write between a question and its answer; no texts if they have none."""
    found = []
    for part in parts_of(recipe.data).values():
        form, text = format_of(part), ""
        if is_chat(part) and tokenizer.chat_template:
            turns = [{"role": "user", "content": _QUESTION}]
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        elif form is not None and form.instruction:
            text = format_dolly(_QUESTION, None, "", completion_only=False).text
        elif form is not None and form.review:
            text = format_review(_QUESTION, "", completion_only=False).text
        found.append(text.rpartition(_QUESTION)[2])
    return list(filter(None, dict.fromkeys(found)))


def prompt_and_answer(sample: Mapping[str, Any], tokenizer: Any, marks: Sequence[str]) -> tuple[list[int], list[int]]:
    """The tokens of a prepared sample before its last trained part, and those of that part; of a pair, those of the
    chosen answer. A sample that is trained from its beginning is divided after the last of the `marks`, and where it
    has none, in half, after 32 tokens at most.
    """
    chosen = slice(sample.get("chosen") or None)
    ids, labels = list(sample["input_ids"][chosen]), list(sample["labels"][chosen])
    end = len(labels)
    while labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    if start <= 1:  # the first token has no label
        text = tokenizer.decode(ids[:end])
        if ends := [text.rfind(mark) + len(mark) for mark in marks if mark in text]:
            start = bisect.bisect_left(range(end), max(ends), key=lambda size: len(tokenizer.decode(ids[:size])))
        else:
            start = max(min(end // 2, _BEGINNING), 1)
    return ids[:start], ids[start:end]


def samples_faults(recipe: Recipe) -> Iterator[Fault]:
    """Settings of the samples that have no effect."""
    settings, key = recipe.evaluation.samples, "evaluation.samples"
    if settings.each_evaluation and not settings.number:
        yield Fault(
            recipe.source.of(key), f"{key}.each_evaluation", "has no effect without prompts", f"set {key}.number"
        )
    elif settings.each_evaluation and recipe.training.get("eval_strategy", "no") == "no":
        problem, hint = "there are no evaluations: training.eval_strategy is no", "use 'steps' or 'epoch'"
        yield Fault(recipe.source.of(key), f"{key}.each_evaluation", problem, hint)


class HeldOutAnswers(TrainerCallback):  # type: ignore[misc]
    """Answers the first prompts of the held-out `split`, as the recipe says. Its time counts as evaluation."""

    def __init__(
        self, recipe: Recipe, split: Any, strategy: Strategy, folder: RunFolder, tokenizer: Any, time: Telemetry
    ) -> None:
        self._strategy, self._folder, self._tokenizer, self._time = strategy, folder, tokenizer, time
        self._settings = settings = recipe.evaluation.samples
        rows = [] if split is None else [split[place] for place in range(min(settings.number, len(split)))]
        parts = [prompt_and_answer(row, tokenizer, marks_of(recipe, tokenizer)) for row in rows]
        self._prompts = [prompt for prompt, _ in parts]
        self.found = Samples(tuple(map(self._text, self._prompts)), tuple(self._text(answer) for _, answer in parts))
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Answer with `trainer`, which can only be built once its callbacks are."""
        self._trainer = trainer

    def answer(self, when: Literal["before", "evaluation", "after"], step: int) -> None:
        """Answer the prompts, and keep the answers in the run's folder. All ranks enter."""
        if not self._prompts:
            return
        assert self._trainer is not None
        model, trainer = self._trainer.model, self._trainer
        ends, options = end_tokens(model, self._tokenizer), dict[str, Any]()
        if "weights" in self._strategy.shards:
            options["synced_gpus"] = True  # no rank stops before the others have
        with self._time.evaluating(), self._strategy.generating(model), trainer.accelerator.autocast():
            limit, pad = self._settings.max_new_tokens, self._tokenizer.pad_token_id
            written = write(model, self._prompts, limit, ends, pad, **options)
        trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        stops = [next((at for at, token in enumerate(row) if token in ends), None) for row in written]
        texts = tuple(self._text(row[:stop]) for row, stop in zip(written, stops, strict=True))
        self.found = self.found.with_answers(Answers(when, step, texts))
        together(self._strategy.world, lambda: self.found.write(self._folder) if self._strategy.world.is_main else None)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    # Trainer's events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.answer("before", 0)
            return
        known = Samples.read(self._folder)
        if known is not None and known.prompts == self.found.prompts:
            self.found = known.until(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        of_validation = any(key.startswith("eval_") for key in metrics or {})
        if self._settings.each_evaluation and of_validation:
            self.answer("evaluation", state.global_step)
