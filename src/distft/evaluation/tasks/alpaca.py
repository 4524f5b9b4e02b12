"""Answers compared with a reference's, paired as in AlpacaEval (Li et al. 2023,
https://github.com/tatsu-lab/alpaca_eval).

`judge.mode: absolute` grades each answer individually: the higher grade wins, and order cannot matter. `pairwise` asks
which of the two is better, once in each order: a judge that prefers the same position both times has said nothing,
which is a tie. Outputs are also written in the format of AlpacaEval's own tool.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.data.prompts import Template
from distft.distributed.collectives import together
from distft.errors import DataError
from distft.evaluation.cache import key_of
from distft.evaluation.engines.choose import choose_engine
from distft.evaluation.generate import Answer, Item, Sampling, describe_answers, generate
from distft.evaluation.judge import Judgement, Question, count, judge_sides, out_of_ten, reasons
from distft.evaluation.metrics import mean_estimate, mean_figure, share_figure, unparsed_figure
from distft.evaluation.overlap import overlap
from distft.evaluation.sets import DataOf
from distft.evaluation.target import SideName, Target
from distft.evaluation.tasks import InputFile, Task
from distft.evaluation.template import prompt_template
from distft.files import write_atomically
from distft.stats import Floats

Outcome = Literal["win", "tie", "loss", "unparsed"]
POINTS: Mapping[Outcome, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0, "unparsed": float("nan")}
_WON = {
    "absolute": ("win_rate", "AlpacaEval pairs won, graded individually"),
    "pairwise": ("preferred_rate", "AlpacaEval pairs won, compared in both orders"),
}
"""Name and title of the share of pairs won in each mode of the judge: the two are different figures."""


@dataclass(frozen=True)
class Pair:
    """An instruction and the reference's output."""

    instruction: str
    output: str
    dataset: str


@dataclass(frozen=True)
class Judged:
    """An answer's outcome against the reference's output."""

    outcome: Outcome
    scores: tuple[float | None, float | None] = (None, None)
    """The scores of answer and reference out of 10; None without a grade."""
    places: tuple[str, str] | None = None
    """The verdicts in the two orders (A is the first answer); None in absolute mode, or if one is unparsed."""


class AlpacaTask(Task):
    """Answer and judge, on both sides.

    `figures`: win_rate in absolute mode, preferred_rate in pairwise mode (a tie is half a win), score (mean out of 10,
    only in absolute mode) and unparsed (share of the verdicts). `outcomes` counts each side's wins, ties, losses and
    pairs without a verdict; `position` says how much the position of an answer mattered.
    """

    files = (InputFile("alpaca.path", "instructions and outputs in AlpacaEval's format"),)
    judged = True

    def data(self, recipe: Recipe) -> DataOf | None:
        path = recipe.evaluation.alpaca.path
        return DataOf.at(Path(path).expanduser()) if path else None

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        path = recipe.evaluation.alpaca.path or ""
        return {"evaluation.alpaca.path": lambda: read_pairs(Path(path))}

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the pairs cannot be read.
        JudgeError: the judge cannot be loaded or reached.
        """
        path = Path(settings.alpaca.path or "")
        pairs = together(target.world, lambda: read_pairs(path, settings.alpaca.limit))
        template = together(target.world, lambda: prompt_template(target, settings))
        seen = overlap(target, [pair.instruction for pair in pairs])
        answers = {side: _answer(target, settings, side, template.name, pairs, folder) for side in target.sides}
        ask = _in_both_orders if settings.judge.mode == "pairwise" else _individually
        asked = {side: ask(side, pairs, answers[side]) for side in target.sides}
        by_side = judge_sides(asked, target, settings, folder)
        if target.world.is_main:
            for side in target.sides:
                generator = f"{target.recipe.model.name} ({side})"
                _write(folder / f"outputs_{side}.json", generator, pairs, answers[side])
        described = {side: describe_answers(answers[side]) for side in target.sides}
        return (
            summarise(by_side, settings)
            | {"answers": described, "template": template.record()}
            | {
                "overlap": seen,
                "items_digest": key_of([(pair.instruction, pair.output) for pair in pairs]),
            }
        )


TASK = AlpacaTask()


def read_pairs(path: Path, limit: int | None = None) -> list[Pair]:
    """The first `limit` entries of a file in AlpacaEval's format: JSON or JSON lines of instruction, output and,
    optionally, dataset.

    Raises:
        DataError: the file cannot be read, or an entry is not a pair.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"the pairs in {path} cannot be read: {error} (evaluation.alpaca.path)") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not all(
            isinstance(record.get(key), str) for key in ("instruction", "output")
        ):
            raise DataError(f"{path}, entry {number}: AlpacaEval's format needs the texts `instruction` and `output`")
    if not records:
        raise DataError(f"{path} has no entries")
    return [Pair(one["instruction"], one["output"], str(one.get("dataset") or path.stem)) for one in records[:limit]]


def _answer(
    target: Target, settings: Evaluation, side: SideName, template: Template, pairs: Sequence[Pair], folder: Path
) -> list[Answer]:
    section = settings.generation
    sampling = Sampling(section.max_new_tokens, section.temperature or 0.0, section.top_p, settings.seed)
    items = [Item(({"role": "user", "content": pair.instruction},), sampling) for pair in pairs]
    with target.side(side):
        engine = choose_engine(target, settings, side, template)
        return generate(engine, items, target.world, folder / "answers.jsonl", side)


def _individually(side: SideName, pairs: Sequence[Pair], answers: Sequence[Answer]) -> list[Question]:
    """The grade of each answer and of the reference's output (whose grade is cached: both sides share it)."""
    return [
        Question(pair.instruction, (text.strip(),), {"side": side, "index": index, "of": of})
        for index, (pair, answer) in enumerate(zip(pairs, answers, strict=True))
        for of, text in (("answer", answer.text), ("reference", pair.output))
    ]


def _in_both_orders(side: SideName, pairs: Sequence[Pair], answers: Sequence[Answer]) -> list[Question]:
    return [
        Question(pair.instruction, texts, {"side": side, "index": index, "first": first})
        for index, (pair, answer) in enumerate(zip(pairs, answers, strict=True))
        for first, texts in (
            ("answer", (answer.text.strip(), pair.output.strip())),
            ("reference", (pair.output.strip(), answer.text.strip())),
        )
    ]


def judged(first: Judgement, second: Judgement) -> Judged:
    """From two grades (answer, reference) or two preferences (answer first, answer second)."""
    if first.value is None or second.value is None:
        return Judged("unparsed", (out_of_ten(first.value), out_of_ten(second.value)))
    if isinstance(first.value, int) and isinstance(second.value, int):
        outcome: Outcome = "win" if first.value > second.value else "loss" if first.value < second.value else "tie"
        return Judged(outcome, (out_of_ten(first.value), out_of_ten(second.value)))
    places = (str(first.value), str(second.value))
    return Judged("tie" if places[0] == places[1] else "win" if places == ("A", "B") else "loss", places=places)


def summarise(judgements: Mapping[SideName, Sequence[Judgement]], settings: Evaluation) -> dict[str, Any]:
    """The figures from the judgements of each side, two per pair, in order."""
    found = {
        side: [judged(*two) for two in zip(given[::2], given[1::2], strict=True)] for side, given in judgements.items()
    }
    points = {side: np.array([POINTS[one.outcome] for one in all_]) for side, all_ in found.items()}
    unparsed = {side: count(given)["unparsed"] / len(given) for side, given in judgements.items()}
    name, title = _WON[settings.judge.mode]
    figures = {
        name: share_figure(points, title=title, form=".1%"),
        "unparsed": unparsed_figure(
            unparsed, "AlpacaEval verdicts that could not be parsed", len(next(iter(judgements.values())))
        ),
    }
    reference = None
    if settings.judge.mode == "absolute":
        scores = {side: _scores(all_, 0) for side, all_ in found.items()}
        figures["score"] = mean_figure(scores, title="AlpacaEval score out of 10", form=".2f")
        reference = mean_estimate(_scores(found["base"], 1)).value
    return {
        "figures": figures,
        "outcomes": {side: _counts(all_) for side, all_ in found.items()},
        "reference_score": reference,
        "position": {side: _position(all_) for side, all_ in found.items()},
        "pairs": len(found["base"]),
        "judge": settings.judge.model_dump(include={"model", "mode", "max_new_tokens"}),
        "judged": {side: count(given) for side, given in judgements.items()},
        "reasons": reasons(judgements.values()),
    }


def _counts(found: Sequence[Judged]) -> dict[Outcome, int]:
    counts = Counter(one.outcome for one in found)
    return {outcome: counts[outcome] for outcome in POINTS}


def _scores(found: Sequence[Judged], which: int) -> Floats:
    scores = [one.scores[which] for one in found]
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def _position(found: Sequence[Judged]) -> dict[str, Any] | None:
    """How often the first answer was preferred (1/2 if position does not matter), and how many pairs got the same
    position in both orders. None in absolute mode, in which an answer has no position."""
    places = [one.places for one in found if one.places is not None]
    if not places:
        return None
    return {
        "first_preferred": sum(verdict == "A" for two in places for verdict in two) / (2 * len(places)),
        "inconsistent": sum(first == second for first, second in places),
        "pairs": len(places),
    }


def _write(path: Path, generator: str, pairs: Sequence[Pair], answers: Sequence[Answer]) -> None:
    """Write a model's outputs in AlpacaEval's format."""
    records = [
        {
            "instruction": pair.instruction,
            "output": answer.text.strip(),
            "generator": generator,
            "dataset": pair.dataset,
        }
        for pair, answer in zip(pairs, answers, strict=True)
    ]
    write_atomically(path, json.dumps(records, ensure_ascii=False, indent=2) + "\n")
