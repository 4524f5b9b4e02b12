"""MT-Bench (Zheng et al. 2023, https://arxiv.org/abs/2306.05685): two turns per question, each answer judged
individually.

The score of a question is the mean of its turns, and that of a side the mean over questions, out of 10 (twice the
grade). Answers are also written in the format of FastChat's tools.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.data.prompts import Message, Template
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.cache import key_of
from distft.evaluation.engines.choose import choose_engine
from distft.evaluation.generate import Answer, Item, Sampling, describe_answers, generate
from distft.evaluation.judge import Judgement, Question, count, judge_sides, out_of_ten, reasons
from distft.evaluation.metrics import mean_estimate, mean_figure, unparsed_figure
from distft.evaluation.overlap import overlap
from distft.evaluation.sets import DataOf
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import InputFile, Task
from distft.evaluation.template import prompt_template
from distft.files import write_atomically
from distft.stats import Floats

TEMPERATURE = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature by category, as the benchmark defines it (FastChat's fastchat/llm_judge/common.py)."""
OTHER_TEMPERATURE = 0.7
"""The temperature of categories that are not in the benchmark (FastChat's gen_model_answer.py)."""
TURNS = 2
_KEYS = ("question_id", "category", "turns")


@dataclass(frozen=True)
class TwoTurns:
    """A question. `reference` has an answer to each turn, or is empty."""

    id: int | str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """The scores of one side out of 10, [questions, turns]; NaN if the verdict could not be parsed."""

    turns: Floats

    @property
    def samples(self) -> Floats:
        """The mean over the turns of a question that have a score, [questions]."""
        known = np.isfinite(self.turns)
        counts: Floats = known.sum(axis=1, dtype=np.float64)
        means: Floats = np.where(known, self.turns, 0.0).sum(axis=1) / np.maximum(counts, 1.0)
        means[counts == 0] = np.nan
        return means


class MtBenchTask(Task):
    """Answer and judge, on both sides.

    `figures`: score, turn_1, turn_2 (means out of 10) and unparsed (share of the verdicts). `categories`: the number of
    questions of each and each side's score.
    """

    files = (InputFile("mt_bench.questions", "a file of questions in MT-Bench's format"),)
    judged = True

    def data(self, recipe: Recipe) -> DataOf | None:
        path = recipe.evaluation.mt_bench.questions
        return DataOf.at(Path(path).expanduser()) if path else None

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        questions = recipe.evaluation.mt_bench.questions or ""
        return {"evaluation.mt_bench.questions": lambda: read_questions(Path(questions))}

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the questions cannot be read.
        JudgeError: the judge cannot be loaded or reached.
        """
        path = Path(settings.mt_bench.questions or "")
        questions = together(target.world, lambda: read_questions(path, settings.mt_bench.limit))
        template = together(target.world, lambda: prompt_template(target, settings))
        seen = overlap(target, [question.turns[0] for question in questions])
        answers = {side: _answer(target, settings, side, template.name, questions, folder) for side in target.sides}
        asked = {side: _to_judge(side, questions, answers[side]) for side in target.sides}
        by_side = judge_sides(asked, target, settings, folder)
        if target.world.is_main:
            for side in target.sides:
                model = f"{target.recipe.model.name} ({side})"
                _write(folder / f"answers_{side}.jsonl", model, questions, answers[side])
        described = {
            side: describe_answers([answer for turns in answers[side] for answer in turns]) for side in target.sides
        }
        return (
            summarise(questions, by_side, settings)
            | {"answers": described, "template": template.record()}
            | {
                "overlap": seen,
                "items_digest": key_of([(question.id, question.turns, question.reference) for question in questions]),
            }
        )


TASK = MtBenchTask()


def read_questions(path: Path, limit: int | None = None) -> list[TwoTurns]:
    """The first `limit` questions of a file in MT-Bench's format: JSON lines of question_id, category, turns and,
    optionally, reference.

    Raises:
        DataError: the file cannot be read, or a line is not a question.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the questions in {path} cannot be read: {error} (evaluation.mt_bench.questions)") from error
    found = [
        _question(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if not found:
        raise DataError(f"{path} has no questions")
    counts = Counter(question.id for question in found)
    if twice := [str(number) for number, times in counts.items() if times > 1]:
        raise DataError(f"{path} has question_id {', '.join(twice)} more than once")
    return found[:limit]


def _question(line: str, where: str) -> TwoTurns:
    try:
        record = json.loads(line)
        if isinstance(record, dict) and (lacking := [key for key in _KEYS if key not in record]):
            raise DataError(f"{where} lacks {', '.join(lacking)}: a question of MT-Bench has {', '.join(_KEYS)}")
        turns, reference = record["turns"], record.get("reference") or []
        question = TwoTurns(record["question_id"], record["category"], tuple(turns), tuple(reference))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        keys = ", ".join(_KEYS)
        raise DataError(f"{where} is not a question of MT-Bench, a JSON object with {keys}: {error}") from error
    texts = [question.category, *question.turns, *question.reference]
    if len(question.turns) != TURNS or not all(isinstance(one, str) for one in texts) or isinstance(turns, str):
        raise DataError(f"{where}: a question needs a category and {TURNS} turns, all of them text")
    return question


def _answer(
    target: Target,
    settings: Evaluation,
    side: SideName,
    template: Template,
    questions: Sequence[TwoTurns],
    folder: Path,
) -> list[tuple[Answer, ...]]:
    """The answers to each question. The second turn sees the first one and the answer to it."""
    answers: list[tuple[Answer, ...]] = [() for _ in questions]
    with target.side(side):
        engine = choose_engine(target, settings, side, template)
        for turn in range(TURNS):
            items = [
                Item(_conversation(question, given), _sampling(question.category, settings))
                for question, given in zip(questions, answers, strict=True)
            ]
            new = generate(engine, items, target.world, folder / "answers.jsonl", f"{side}, turn {turn + 1}")
            answers = [(*given, answer) for given, answer in zip(answers, new, strict=True)]
    return answers


def _conversation(question: TwoTurns, given: Sequence[Answer]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for text, answer in zip(question.turns, given, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
    return (*messages, {"role": "user", "content": question.turns[len(given)]})


def _sampling(category: str, settings: Evaluation) -> Sampling:
    section = settings.generation
    temperature = TEMPERATURE.get(category, OTHER_TEMPERATURE) if section.temperature is None else section.temperature
    return Sampling(section.max_new_tokens, temperature, section.top_p, settings.seed)


def _to_judge(side: SideName, questions: Sequence[TwoTurns], answers: Sequence[Sequence[Answer]]) -> list[Question]:
    """A question to the judge for each turn, in order. For the second turn the instruction is the conversation so
    far."""
    found = []
    for question, given in zip(questions, answers, strict=True):
        for turn, answer in enumerate(given):
            about = {"side": side, "question_id": question.id, "category": question.category, "turn": turn + 1}
            reference = question.reference[turn] if turn < len(question.reference) else None
            found.append(Question(_instruction(question, given, turn), (answer.text.strip(),), about, reference))
    return found


def _instruction(question: TwoTurns, given: Sequence[Answer], turn: int) -> str:
    if turn == 0:
        return question.turns[0]
    return (
        "This is a conversation; only the response to its last message is to be judged.\n\n"
        f"User: {question.turns[0]}\n\nAssistant: {given[0].text.strip()}\n\nUser: {question.turns[1]}"
    )


def summarise(
    questions: Sequence[TwoTurns], judgements: Mapping[SideName, Sequence[Judgement]], settings: Evaluation
) -> dict[str, Any]:
    """The figures from the judgements of each side, one per question and turn, in order."""
    scores = {side: Scores(_matrix(found)) for side, found in judgements.items()}
    samples = {side: one.samples for side, one in scores.items()}
    named = {"score": ("MT-Bench score out of 10", samples)} | {
        f"turn_{turn + 1}": (f"MT-Bench, turn {turn + 1}", {side: one.turns[:, turn] for side, one in scores.items()})
        for turn in range(TURNS)
    }
    categories = sorted({question.category for question in questions})
    members = {name: np.array([question.category == name for question in questions]) for name in categories}
    unparsed = {side: count(found)["unparsed"] / len(found) for side, found in judgements.items()}
    return {
        "figures": {
            **{name: mean_figure(values, title=title, form=".2f") for name, (title, values) in named.items()},
            "unparsed": unparsed_figure(unparsed, "MT-Bench verdicts that could not be parsed", TURNS * len(questions)),
        },
        "categories": {
            name: {
                "count": int(member.sum()),
                **{side: asdict(mean_estimate(values[member])) for side, values in samples.items()},
            }
            for name, member in members.items()
        },
        "questions": len(questions),
        "judge": settings.judge.model_dump(include={"model", "max_new_tokens"}) | {"mode": "absolute"},
        "judged": {side: count(found) for side, found in judgements.items()},
        "reasons": reasons(judgements.values()),
    }


def _matrix(judgements: Sequence[Judgement]) -> Floats:
    grades = [out_of_ten(judgement.value) for judgement in judgements]
    return np.array([np.nan if grade is None else grade for grade in grades], dtype=np.float64).reshape(-1, TURNS)


def _write(path: Path, model: str, questions: Sequence[TwoTurns], answers: Sequence[Sequence[Answer]]) -> None:
    """Write answers in the format of FastChat's tools."""
    records = (
        {
            "question_id": question.id,
            "model_id": model,
            "choices": [{"index": 0, "turns": [answer.text for answer in given]}],
        }
        for question, given in zip(questions, answers, strict=True)
    )
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
