"""The judge: any causal language model in this process, or one behind an OpenAI-compatible server.

It is asked in the form that Prometheus 2 was trained on (Kim et al. 2024, https://arxiv.org/abs/2405.01535: the headings, and
`Feedback: … [RESULT] …` as the answer), in words of our own. What it wrote is kept, all of it; a verdict that cannot be read is asked
for again, and counted as unparsed in the end.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from distft.config.evaluation import Evaluation, Judge
from distft.config.recipe import Recipe
from distft.config.schema import Quantization
from distft.distributed.collectives import together
from distft.errors import JudgeError, ModelError
from distft.evaluation.engines.openai import Endpoint
from distft.evaluation.engines.transformers import TransformersEngine
from distft.evaluation.generate import Answer, Engine, Item, Message, Sampling, generate, rendered, template_of
from distft.evaluation.judge_parsing import Kind, parse_verdict
from distft.evaluation.target import Target
from distft.files import to_json, write_atomically
from distft.models.loading import load_base, load_tokenizer, model_path

RUBRIC = """\
[Would somebody who asked this be well served: is the response right, does it do all that was asked, and is it clear?]
Score 1: It is wrong, off the subject, unreadable or no response at all.
Score 2: It touches the subject, but faults or gaps make it of little use.
Score 3: It helps in part: the main point is there, with something notable wrong, missing or unclear.
Score 4: It is right, does nearly all that was asked and reads well; small things could be better.
Score 5: It is right, complete and clear, and nothing of weight could be improved."""
"""The rubric where the recipe names no file with another."""

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
1. Write feedback that compares the two responses by this rubric, and by nothing else. Their order and their length say nothing.
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
    """What the judge is asked: a grade for one response, or which of two is better. `about` is what the record says it is about."""

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
            instruction=self.instruction, response=self.responses[0], other=self.responses[-1], reference=reference,
            with_reference=with_reference, rubric=rubric,
        )  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """`value` is 1 to 5, or A or B; None where none of `attempts` answers could be read, for the `reason` that the last one had."""

    value: int | str | None
    reason: str | None
    attempts: int


class LocalJudge:
    """A causal language model on this process's device. It is loaded when something has to be judged, which is not already."""

    def __init__(self, target: Target, settings: Evaluation) -> None:
        """Raises:
        JudgeError: it cannot be had.
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
            "engine": "transformers", "model": judge.model, "revision": self._revision, "dtype": judge.dtype,
            "bits": 4 if judge.load_in_4bit else 16 if judge.dtype != "float32" else 32,
            "template": self._template,
        }  # fmt: skip

    def prompt(self, messages: Sequence[Message]) -> str:
        return rendered(self._tokenizer, self._template, messages)

    def write(self, items: Sequence[Item]) -> Iterable[tuple[int, Answer]]:
        """Raises:
        JudgeError: it cannot be loaded.
        OutOfMemory: it does not fit on the device.
        """
        if items and self._engine is None:
            device = self._target.device
            place = {"": device.index or 0} if device.type == "cuda" else None
            try:
                model = load_base(self._recipe, device_map=place, attn_implementation="sdpa").eval()
            except (ModelError, OSError, ValueError) as error:
                raise self._unavailable(error) from error
            self._engine = TransformersEngine(
                model, self._tokenizer, {}, batch_tokens=self._batch_tokens, template=self._template
            )
        return self._engine.write(items) if self._engine is not None else ()

    def close(self) -> None:
        """Give its memory back."""
        self._engine = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _unavailable(self, error: Exception) -> JudgeError:
        # What else the error says names settings of the model that is evaluated.
        problem = next(iter(str(error).splitlines()), type(error).__name__).replace("(model.name)", "").strip()
        name = self.judge.model
        fetched = (
            "" if name.startswith(("/", ".", "~")) or Path(name).is_dir()
            else f"  on a machine with a connection: distft fetch, with the same words, or hf download {name}\n"
        )  # fmt: skip
        return JudgeError(
            f"the judge {name} cannot be loaded: {problem}\n{fetched}"
            "  give the folder that it lies in (evaluation.judge.model=FOLDER), or a server that has it "
            "(evaluation.judge.endpoint=http://HOST:PORT/v1)"
        )


def judge_all(questions: Sequence[Question], target: Target, settings: Evaluation, folder: Path) -> list[Judgement]:
    """The judgement on each question, in order and on all ranks. All ranks enter.

    Every answer of the judge is kept in `folder`/judge_answers.jsonl as it comes, and found there again by its content; the judgements
    with their prompts, rubric, model, revision, sampling and raw outputs stand in `folder`/judgements.jsonl.

    Raises:
        JudgeError: the judge cannot be had, or the rubric's file cannot be read.
    """
    judge = settings.judge
    rubric = together(target.world, lambda: rubric_of(judge))
    prompts = [question.prompt(rubric) for question in questions]
    local = together(target.world, lambda: LocalJudge(target, settings)) if judge.endpoint is None else None
    engine: Engine = local or Endpoint(judge, target.world)
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
        for index, answer in zip(asked, answers, strict=True):
            verdict = parse_verdict(answer.text, questions[index].kind, finished=answer.finished)
            raw[index].append({
                "output": answer.text, "finished": answer.finished, "sampling": sampling.content(),
                "verdict": verdict.value, "reason": verdict.reason,
            })  # fmt: skip
            if verdict.value is not None or attempt == judge.attempts - 1:
                judgements[index] = Judgement(verdict.value, verdict.reason, attempt + 1)
    if local is not None:
        local.close()
    found = [judgements[index] for index in range(len(questions))]
    if target.world.is_main:
        records = [
            {
                **question.about, "kind": question.kind, "verdict": judgement.value, "reason": judgement.reason, "judge": by(engine, judge),
                "rubric": rubric, "prompt": prompt, "attempts": attempts,
            }
            for question, judgement, prompt, attempts in zip(questions, found, prompts, raw, strict=True)
        ]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(json.loads(to_json(record)), ensure_ascii=False) + "\n" for record in records)
        write_atomically(folder / "judgements.jsonl", "".join(lines))
    return found


def by(engine: Engine, judge: Judge) -> dict[str, Any]:
    """Who judged, for the record: with the address of a server, less what stands before an @ in it."""
    return {**engine.identity, "endpoint": engine.shown if isinstance(engine, Endpoint) else None, "mode": judge.mode}


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
    """A grade of 1 to 5 as the score that is shown; None for none."""
    return 2.0 * grade if isinstance(grade, int) else None


def count(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many were asked for, could not be read, and were asked for more than once."""
    return {
        "judgements": len(judgements),
        "unparsed": sum(one.value is None for one in judgements),
        "asked_again": sum(one.attempts > 1 for one in judgements),
    }


def reasons(judgements: Iterable[Sequence[Judgement]]) -> dict[str, int]:
    """Why verdicts could not be read, and how many for each reason, the commonest first."""
    found = Counter(one.reason for group in judgements for one in group if one.value is None and one.reason)
    return dict(found.most_common())


def _again(first: Sampling, attempt: int, temperature: float) -> Sampling:
    return replace(first, temperature=max(first.temperature, temperature), seed=first.seed + attempt)


def as_recipe(recipe: Recipe, judge: Judge) -> Recipe:
    """A recipe that says of the judge what recipes say of a base."""
    section = recipe.model.model_copy(
        update={"name": judge.model, "revision": judge.revision, "tokenizer": None, "dtype": judge.dtype}
        | {"trust_remote_code": False, "attn_implementation": "auto"}
    )
    bits = Quantization(load_in_4bit=True, bnb_4bit_compute_dtype=judge.dtype) if judge.load_in_4bit else None
    return recipe.model_copy(update={"model": section, "quantization": bits, "lora": None})


def _revision(recipe: Recipe) -> str:
    """The commit of a model from the hub, or the hash of a folder's weights and settings."""
    folder = Path(model_path(recipe))
    if not folder.is_dir():
        config = hf_hub_download(str(folder), "config.json", revision=recipe.model.revision)
        return Path(config).parent.name  # the hub's cache has a folder for each commit
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
