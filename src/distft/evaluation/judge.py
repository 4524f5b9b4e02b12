"""The judge: any causal language model in this process, or one behind an OpenAI-compatible server.

Prompts have the form that Prometheus 2 was trained on (Kim et al. 2024, https://arxiv.org/abs/2405.01535: the
headings, and `Feedback: … [RESULT] …` as the answer), in our own words. Everything the judge writes is kept. If a
verdict cannot be parsed, the judge is asked again; after the last attempt it counts as unparsed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from distft.config.evaluation import Evaluation, Judge
from distft.config.recipe import Recipe
from distft.config.schema import Quantization
from distft.data.prompts import Message, render, template_of
from distft.distributed.collectives import together
from distft.errors import JudgeError, ModelError
from distft.evaluation.engines.openai import JudgeServer
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Answer, Engine, Item, Sampling, generate
from distft.evaluation.judge_parsing import Kind, Verdict, opens_reasoning, parse_verdict, reasons_from_the_start
from distft.evaluation.target import SideName, Target
from distft.files import to_json, write_atomically
from distft.models.digest import contents
from distft.models.loading import load_base, load_tokenizer, model_path
from distft.text import first_line

RUBRIC = """\
[Would somebody who asked this be well served: is the response right, does it do all that was asked, and is it clear?]
Score 1: It is wrong, off the subject, unreadable or no response at all.
Score 2: It touches the subject, but faults or gaps make it of little use.
Score 3: It helps in part: the main point is there, with something notable wrong, missing or unclear.
Score 4: It is right, does nearly all that was asked and reads well; small things could be better.
Score 5: It is right, complete and clear, and nothing of weight could be improved."""
"""The rubric if the recipe names no file. Like the prompts below it is part of the measurement: any edit changes the
figures."""

_GRADE = """\
###Task Description:
Below stand an instruction (it may be a whole conversation), a response to it{with_reference} and a rubric of scores.
1. Write feedback on how good the response is by this rubric, and by nothing else.
2. Then give it the score that fits the rubric: one integer from 1 to 5.
3. Write it in this form: "Feedback: (your feedback) [RESULT] (an integer from 1 to 5)"
4. Write nothing before the feedback and nothing after the score.

###The instruction to evaluate:
{instruction}

###Response to evaluate:
{response}
{reference}
###Score Rubrics:
{rubric}

###Feedback:"""

_COMPARE = """\
###Task Description:
Below stand an instruction (it may be a whole conversation), two responses to it{with_reference} and a rubric of scores.
1. Write feedback that compares the two responses by this rubric, and by nothing else. Their order and \
their length say nothing.
2. Then say which of the two is better: A or B.
3. Write it in this form: "Feedback: (your feedback) [RESULT] (A or B)"
4. Write nothing before the feedback and nothing after the verdict.

###Instruction:
{instruction}

###Response A:
{response}

###Response B:
{other}
{reference}
###Score Rubric:
{rubric}

###Feedback:"""


@dataclass(frozen=True)
class Question:
    """A question to the judge: the grade of one response, or which of two is better. `about` identifies it in the
    record."""

    instruction: str
    responses: tuple[str, ...]
    about: Mapping[str, Any]
    reference: str | None = None

    @property
    def kind(self) -> Kind:
        return "grade" if len(self.responses) == 1 else "preference"

    def prompt(self, rubric: str) -> str:
        reference = "" if self.reference is None else f"\n###Reference Answer (Score 5):\n{self.reference}\n"
        with_reference = "" if self.reference is None else ", a reference answer that has earned the highest score"
        return (_GRADE if self.kind == "grade" else _COMPARE).format(
            instruction=self.instruction,
            response=self.responses[0],
            other=self.responses[-1],
            reference=reference,
            with_reference=with_reference,
            rubric=rubric,
        )


@dataclass(frozen=True)
class Judgement:
    """`value` is 1 to 5, or A or B. It is None if none of `attempts` answers could be parsed; `reason` is that of the
    last."""

    value: int | str | None
    reason: str | None
    attempts: int


class LocalJudge:
    """A causal language model on this process's device, loaded when the first uncached judgement is needed."""

    def __init__(self, target: Target, settings: Evaluation) -> None:
        """Raises:
        JudgeError: the model cannot be found.
        """
        self.judge, self._batch_tokens = settings.judge, settings.generation.batch_tokens
        self._recipe, self._target = as_recipe(target.recipe, settings.judge), target
        try:
            self._tokenizer = load_tokenizer(self._recipe)
            self._revision = _revision(self._recipe)
        except (ModelError, OSError, ValueError) as error:
            raise self._unavailable(error) from error
        self._engine: TransformersEngine | None = None
        self._template = template_of(self._tokenizer, "plain")

    @property
    def identity(self) -> Mapping[str, Any]:
        judge = self.judge
        return {
            "engine": "transformers",
            "model": judge.model,
            "revision": self._revision,
            "dtype": judge.dtype,
            "bits": 4 if judge.load_in_4bit else 16 if judge.dtype != "float32" else 32,
            "template": self._template,
        }

    def prompt(self, messages: Sequence[Message]) -> str:
        return render(self._tokenizer, self._template, messages)

    def write(self, items: Sequence[Item]) -> Iterable[tuple[int, Answer]]:
        """Raises:
        JudgeError: the model cannot be loaded.
        OutOfMemory: it does not fit on the device.
        """
        if items and self._engine is None:
            device = self._target.device
            place = {"": device.index or 0} if device.type == "cuda" else None
            try:
                model = load_base(self._recipe, device_map=place).eval()
            except (ModelError, OSError, ValueError) as error:
                raise self._unavailable(error) from error
            self._engine = TransformersEngine(
                model, self._tokenizer, {}, batch_tokens=self._batch_tokens, template=self._template
            )
        return self._engine.write(items) if self._engine is not None else ()

    def close(self) -> None:
        """Free the device's memory."""
        self._engine = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _unavailable(self, error: Exception) -> JudgeError:
        # The rest of the error names settings of the evaluated model, not of the judge.
        problem = re.sub(r" *\(model\.\w+\)$", "", first_line(error))
        name = self.judge.model
        is_folder = name.startswith(("/", ".", "~")) or Path(name).is_dir()
        fetch = f"  on a machine with a connection: distft fetch with the same arguments, or hf download {name}\n"
        return JudgeError(
            f"the judge {name} cannot be loaded: {problem}\n{'' if is_folder else fetch}"
            "  give its folder (evaluation.judge.model=FOLDER), or a server that serves it "
            "(evaluation.judge.endpoint=http://HOST:PORT/v1)"
        )


def judge_all(questions: Sequence[Question], target: Target, settings: Evaluation, folder: Path) -> list[Judgement]:
    """The judgement on each question, in order and on all ranks. All ranks call this.

    The judge's answers are cached in `folder`/judge_answers.jsonl. `folder`/judgements.jsonl records the judgements
    with their prompts, rubric, model, revision, sampling and raw outputs.

    Raises:
        JudgeError: the judge cannot be loaded or reached, or the rubric's file cannot be read.
    """
    judge = settings.judge
    rubric = together(target.world, lambda: rubric_of(judge))
    prompts = [question.prompt(rubric) for question in questions]
    local = together(target.world, lambda: LocalJudge(target, settings)) if judge.endpoint is None else None
    engine: Engine = local or JudgeServer(judge, target.world)
    raw: list[list[dict[str, Any]]] = [[] for _ in questions]
    judgements: dict[int, Judgement] = {}
    first = Sampling(judge.max_new_tokens, judge.temperature, judge.top_p, settings.seed)
    for attempt in range(judge.attempts):
        asked = [index for index in range(len(questions)) if index not in judgements]
        if not asked:
            break
        sampling = first if attempt == 0 else _again(first, attempt, judge.retry_temperature)
        items = [Item(({"role": "user", "content": prompts[index]},), sampling) for index in asked]
        title = "judging" if attempt == 0 else f"judging again ({attempt + 1} of {judge.attempts})"
        answers = generate(engine, items, target.world, folder / "judge_answers.jsonl", title)
        reasons_first = any(reasons_from_the_start(answer.text) for answer in answers)
        for index, item, answer in zip(asked, items, answers, strict=True):
            verdict = parse_verdict(
                answer.text,
                questions[index].kind,
                finished=answer.finished,
                # Only a server knows its template; what it cut off may be reasoning if that of others had an end.
                reasoning=opens_reasoning(engine.prompt(item.messages)) or (reasons_first and not answer.finished),
            )
            if not answer.text.strip() and answer.why_empty:
                verdict = Verdict(None, answer.why_empty)
            raw[index].append(
                {
                    "output": answer.text,
                    "finished": answer.finished,
                    "sampling": sampling.content(),
                    "verdict": verdict.value,
                    "reason": verdict.reason,
                }
            )
            if verdict.value is not None or attempt == judge.attempts - 1:
                judgements[index] = Judgement(verdict.value, verdict.reason, attempt + 1)
    if local is not None:
        local.close()
    found = [judgements[index] for index in range(len(questions))]
    if target.world.is_main:
        who = _who(engine, judge)
        records = [
            {
                **question.about,
                "kind": question.kind,
                "verdict": judgement.value,
                "reason": judgement.reason,
                "judge": who,
                "rubric": rubric,
                "prompt": prompt,
                "attempts": attempts,
            }
            for question, judgement, prompt, attempts in zip(questions, found, prompts, raw, strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(json.loads(to_json(record)), ensure_ascii=False) + "\n" for record in records)
        write_atomically(folder / "judgements.jsonl", "".join(lines))
    return found


def judge_sides(
    asked: Mapping[SideName, Sequence[Question]], target: Target, settings: Evaluation, folder: Path
) -> dict[SideName, list[Judgement]]:
    """`judge_all` on the questions of every side, with one load of the judge. All ranks call this."""
    questions = [question for side in asked.values() for question in side]
    judgements = iter(judge_all(questions, target, settings, folder))
    return {side: list(islice(judgements, len(questions))) for side, questions in asked.items()}


def _who(engine: Engine, judge: Judge) -> dict[str, Any]:
    """Who judged, for the record; a server's address is recorded without user name and password."""
    address = engine.address if isinstance(engine, JudgeServer) else None
    return {**engine.identity, "endpoint": address, "mode": judge.mode}


def rubric_of(judge: Judge) -> str:
    """The text of the rubric.

    Raises:
        JudgeError: the file cannot be read, or has no line for one of the grades.
    """
    if judge.rubric is None:
        return RUBRIC
    try:
        text = Path(judge.rubric).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"the rubric {judge.rubric} cannot be read: {error} (evaluation.judge.rubric)") from error
    missing = [f"Score {grade}:" for grade in range(1, 6) if f"Score {grade}:" not in text]
    if missing:
        raise JudgeError(
            f"the rubric {judge.rubric} lacks {', '.join(missing)}: it needs a line for each grade from 1 to 5"
        )
    return text


def out_of_ten(grade: int | str | None) -> float | None:
    """The score that is shown for a grade from 1 to 5; None for anything else."""
    return 2.0 * grade if isinstance(grade, int) else None


def count(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many judgements there are, how many of them are unparsed, and how many took more than one attempt."""
    return {
        "judgements": len(judgements),
        "unparsed": sum(one.value is None for one in judgements),
        "asked_again": sum(one.attempts > 1 for one in judgements),
    }


def reasons(judgements: Iterable[Sequence[Judgement]]) -> dict[str, int]:
    """How many verdicts could not be parsed for each reason, the most common first."""
    found = Counter(one.reason for group in judgements for one in group if one.value is None and one.reason)
    return dict(found.most_common())


def _again(first: Sampling, attempt: int, temperature: float) -> Sampling:
    return replace(first, temperature=max(first.temperature, temperature), seed=first.seed + attempt)


def as_recipe(recipe: Recipe, judge: Judge) -> Recipe:
    """A recipe whose model is the judge."""
    section = recipe.model.model_copy(
        update={"name": judge.model, "revision": judge.revision, "tokenizer": None, "dtype": judge.dtype}
        | {"trust_remote_code": False, "attn_implementation": "auto"}
    )
    bits = Quantization(load_in_4bit=True, bnb_4bit_compute_dtype=judge.dtype) if judge.load_in_4bit else None
    return recipe.model_copy(update={"model": section, "quantization": bits, "lora": None})


def _revision(recipe: Recipe) -> str:
    """The commit of a model on the hub, or a digest of everything in a folder that is loaded."""
    folder = Path(model_path(recipe))
    if not folder.is_dir():
        config = hf_hub_download(str(folder), "config.json", revision=recipe.model.revision)
        return Path(config).parent.name  # the hub's cache has a folder for each commit
    return str(contents(str(folder)))
