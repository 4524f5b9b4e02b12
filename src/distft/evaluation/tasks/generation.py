"""Answers to the prompts in a file of the user's, compared with its references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from distft.config.evaluation import Evaluation, Generation
from distft.config.recipe import Recipe
from distft.data.labelled import file_of
from distft.data.prompts import Message, Template
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.answers import Prompt, prompts_of
from distft.evaluation.cache import key_of
from distft.evaluation.closeness import figures
from distft.evaluation.engines.choose import choose_engine
from distft.evaluation.generate import Answer, Item, Sampling, describe_answers, generate
from distft.evaluation.judge import Question, count, judge_sides, out_of_ten, reasons
from distft.evaluation.metrics import mean_figure, unparsed_figure
from distft.evaluation.overlap import overlap
from distft.evaluation.sets import DataOf
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import Task
from distft.evaluation.template import prompt_template

_KEY = "evaluation.generation.path"
_REFERENCES = ("reference", "references", "response", "completion", "output", "answer")


class Asked(NamedTuple):
    """A conversation to answer, and the answers that would be right."""

    messages: tuple[Message, ...]
    references: tuple[str, ...]

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


class GenerationTask(Task):
    """Answer with both sides and compare; `figures` has those of `evaluation.generation.metrics`."""

    packages: ClassVar = {"sacrebleu": "sacrebleu", "rouge_score": "rouge-score"}

    def asks_judge(self, settings: Evaluation) -> bool:
        return settings.generation.judged

    def data(self, recipe: Recipe) -> DataOf | None:
        path = recipe.evaluation.generation.path
        return DataOf.at(file_of(path)) if path else None

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        return {_KEY: lambda: read_prompts(recipe.evaluation.generation)}

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the prompts cannot be read.
        JudgeError: a judge is asked for, and cannot be loaded or reached.
        """
        section = settings.generation
        asked = together(target.world, lambda: read_prompts(section))
        template = together(target.world, lambda: prompt_template(target, settings))
        seen = overlap(target, [one.question for one in asked])
        answers = {side: _answer(target, settings, side, template.name, asked, folder) for side in target.sides}
        texts = {side: [answer.text.strip() for answer in given] for side, given in answers.items()}
        found = figures(texts, [one.references for one in asked], section.metrics, section.bleu_tokenize, settings.seed)
        result = {
            "prompts": len(asked),
            "template": template.record(),
            "answers": {side: describe_answers(answers[side]) for side in target.sides},
            "overlap": seen,
            "items_digest": key_of([(one.messages, one.references) for one in asked]),
        }
        if not section.judged:
            return result | {"figures": found}
        judged = _judged(target, settings, asked, texts, folder)
        return result | judged | {"figures": found | judged["figures"]}


TASK = GenerationTask()


def read_prompts(section: Generation) -> list[Asked]:
    """The prompts of the file with their references.

    Raises:
        DataError: no file is named, it cannot be read, or a row has no prompt or no reference.
    """
    if section.path is None:
        raise DataError(f"is required for this task: prompts with references\n  {_KEY}=FILE")
    path = file_of(section.path)
    return [
        Asked(prompt.messages, _references(prompt, section, f"{section.path}, row {number}"))
        for number, prompt in enumerate(prompts_of(path)[: section.limit], 1)
    ]


def _references(prompt: Prompt, section: Generation, where: str) -> tuple[str, ...]:
    row = prompt.row
    column = section.reference or next((name for name in _REFERENCES if row.get(name)), None)
    found: Any = row.get(column) if column is not None else _last_answer(row)
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        columns = section.reference or ", ".join(_REFERENCES)
        raise DataError(
            f"{where} has no reference: expected a text or a list of texts in {columns}; found {', '.join(row)}\n"
            "  evaluation.generation.reference=COLUMN"
        )
    return tuple(text.strip() for text in texts)


def _last_answer(row: Mapping[str, Any]) -> str | None:
    turns = row.get("messages") or row.get("conversations") or []
    last = turns[-1] if isinstance(turns, list) and turns else {}
    found = (last.get("content") or last.get("value")) if isinstance(last, Mapping) else None
    role = last.get("role") or last.get("from") if isinstance(last, Mapping) else None
    return found if isinstance(found, str) and role in ("assistant", "gpt") else None


def _answer(
    target: Target, settings: Evaluation, side: SideName, template: Template, asked: Sequence[Asked], folder: Path
) -> list[Answer]:
    section = settings.generation
    sampling = Sampling(section.max_new_tokens, section.temperature or 0.0, section.top_p, settings.seed)
    items = [Item(one.messages, sampling) for one in asked]
    with target.side(side):
        engine = choose_engine(target, settings, side, template)
        return generate(engine, items, target.world, folder / "answers.jsonl", f"generation, {side}")


def _judged(
    target: Target, settings: Evaluation, asked: Sequence[Asked], texts: Mapping[SideName, list[str]], folder: Path
) -> dict[str, Any]:
    """The grade of each answer by the judge, who sees the first reference."""
    questions = {
        side: [
            Question(one.question, (text,), {"side": side, "index": index}, one.references[0])
            for index, (one, text) in enumerate(zip(asked, given, strict=True))
        ]
        for side, given in texts.items()
    }
    found = judge_sides(questions, target, settings, folder)
    unparsed = {side: count(given)["unparsed"] / len(given) for side, given in found.items()}
    grades = {side: [out_of_ten(one.value) for one in given] for side, given in found.items()}
    scores = {side: np.array(given, dtype=np.float64) for side, given in grades.items()}  # NaN for None
    return {
        "figures": {
            "score": mean_figure(scores, title="score out of 10", form=".2f"),
            "unparsed": unparsed_figure(unparsed, "verdicts that could not be parsed", len(asked)),
        },
        "judge": settings.judge.model_dump(include={"model", "mode", "max_new_tokens"}),
        "judged": {side: count(given) for side, given in found.items()},
        "reasons": reasons(found.values()),
    }
