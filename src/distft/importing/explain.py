"""A row of the user's data as distft trains on it, and as the program does that the configuration is for.

What the programs do is followed as far as it is known: their templates of conversations are the tokenizer's, as a
recipe's are; axolotl's Alpaca prompt and the templates of LLaMA-Factory are written here as they write them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.config.recipe import Recipe
from distft.data.conversations import conversation
from distft.data.formats import formatter
from distft.data.inference import with_format
from distft.data.sources import read_data
from distft.data.templates import Dropped
from distft.data.tokenize import IGNORED, tokenize
from distft.errors import DataError

Parts = list[tuple[str, bool]]
"""Texts, each with whether it is trained."""
_TASK = "Below is an instruction that describes a task"
_INPUT = ", paired with an input that provides further context"
_RESPONSE = ". Write a response that appropriately completes the request.\n\n"
_CHATML = ("<|im_start|>{role}\n{text}<|im_end|>\n", "<|im_start|>assistant\n", "{text}<|im_end|>\n")
_LLAMA3 = (
    "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "{text}<|eot_id|>",
)
LLAMA_FACTORY: dict[str, tuple[tuple[str, str, str], str]] = {
    "qwen": (_CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3_nothink": (_CHATML, ""),
    "llama3": (_LLAMA3, ""),
}
"""LLaMA-Factory's templates: a turn, what begins an answer, an answer, and the default system prompt."""


@dataclass(frozen=True)
class Trained:
    """Ids, and which of them count towards the loss."""

    ids: Sequence[int]
    counts: Sequence[bool]


def explain(recipe: Recipe, program: str, given: Mapping[str, Any], number: int, tokenizer: Any) -> list[str]:
    """Row `number` (from 1) as both train on it, in lines for the terminal.

    Raises:
        DataError: there is no such row, or it does not fit the format.
    """
    recipe, _ = with_format(recipe, tokenizer)
    source = read_data(recipe.data)[0]
    row = next(itertools.islice(source, number - 1, None), None) if number > 0 else None
    if row is None:
        raise DataError(f"the data has no row {number}; rows count from 1")
    ours = _ours(recipe, row, tokenizer)
    lines = _shown("distft", ours, tokenizer) if isinstance(ours, Trained) else [f"── distft: {ours}"]
    theirs = _theirs(recipe, program, given, row, tokenizer)
    if isinstance(theirs, str):
        return [*lines, f"── {program}: not known: {theirs}"]
    lines += _shown(program, theirs, tokenizer)
    return lines + (_divergence(ours, theirs, tokenizer) if isinstance(ours, Trained) else [])


def _ours(recipe: Recipe, row: Mapping[str, Any], tokenizer: Any) -> Trained | str:
    example = formatter(recipe, tokenizer)(row)
    if isinstance(example, Dropped):
        return f"the row is dropped: {example.reason}"
    ids, labels, _ = next(tokenize([example], tokenizer, recipe.training.get("max_length", 1024)))
    return Trained(ids, [label != IGNORED for label in labels])


def _theirs(
    recipe: Recipe, program: str, given: Mapping[str, Any], row: Mapping[str, Any], tokenizer: Any
) -> Trained | str:
    form = recipe.data.format
    if form is None or recipe.prefers:
        return "pairs of answers are not followed here"
    if form.text is not None:
        return _encoded([(str(row[form.text]) + tokenizer.eos_token, True)], tokenizer, _added(tokenizer))
    if form.instruction is not None and form.response is not None:
        question, answer = str(row[form.instruction]), str(row[form.response])
        context = str(row.get(form.context) or "") if form.context else ""
        if program == "axolotl" and not recipe.data.chat_template:
            head = _TASK + (_INPUT if context else "") + _RESPONSE + f"### Instruction:\n{question}\n\n"
            head += (f"### Input:\n{context}\n\n" if context else "") + "### Response:\n"
            asked = bool(given.get("train_on_inputs"))
            return _encoded([(head, asked), (answer + tokenizer.eos_token, True)], tokenizer, _added(tokenizer))
        if program != "llamafactory":
            return "it leaves the text of such columns to code of the user's"
        said = [("user", question + (f"\n{context}" if context else "")), ("assistant", answer)]
    elif form.messages is not None:
        messages = conversation(row[form.messages], form.messages).messages
        said = [(str(message["role"]), str(message.get("content") or "")) for message in messages]
    else:
        return "its columns are not followed here"
    if program == "llamafactory":
        return _llama_factory(said, given, tokenizer)
    return _by_template(said, everything=recipe.data.train_on == "all", tokenizer=tokenizer)


def _llama_factory(said: list[tuple[str, str]], given: Mapping[str, Any], tokenizer: Any) -> Trained | str:
    name = str(given.get("template"))
    if name not in LLAMA_FACTORY:
        return f"its template {name!r} is written in Python"
    (turn, head, answer), system = LLAMA_FACTORY[name]
    if system and said[0][0] != "system":
        said = [("system", system), *said]
    last = max((at for at, (role, _) in enumerate(said) if role == "assistant"), default=-1)
    parts: Parts = []
    for at, (role, text) in enumerate(said):
        if role == "assistant":
            counts = at == last or not given.get("mask_history")
            parts += [(head, bool(given.get("train_on_prompt"))), (answer.format(text=text), counts)]
        else:
            parts.append((turn.format(role=role, text=text), bool(given.get("train_on_prompt"))))
    return _encoded(parts, tokenizer, [tokenizer.bos_token_id] if name == "llama3" else [])


def _by_template(said: list[tuple[str, str]], *, everything: bool, tokenizer: Any) -> Trained | str:
    """By the tokenizer's template: all tokens, or each answer up to the token that ends it."""
    messages = [{"role": role, "content": text} for role, text in said]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        parts: Parts = []
        done = 0
        for at, (role, text) in enumerate(said):
            if role == "assistant":
                head = tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
                end = whole.index(text, len(head)) + len(text)
                after = tokenizer.apply_chat_template(messages[: at + 1], tokenize=False)
                end = len(after.rstrip("\n")) if whole.startswith(after) else end
                parts += [(whole[done : len(head)], everything), (whole[len(head) : end], True)]
                done = end
    except Exception as error:  # a template raises what it likes
        return f"the tokenizer's chat template fails: {error}"
    return _encoded([*parts, (whole[done:], everything)], tokenizer)


def _encoded(parts: Parts, tokenizer: Any, begin: Sequence[int] = ()) -> Trained:
    """The texts, each tokenized by itself, after the tokens `begin`."""
    ids = list(begin)
    counts = [False] * len(ids)
    for text, trained in parts:
        more = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, counts = ids + more, counts + [trained] * len(more)
    return Trained(ids, counts)


def _added(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    ids = list(tokenizer("")["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _shown(name: str, trained: Trained, tokenizer: Any) -> list[str]:
    text = ""
    for counts, group in itertools.groupby(zip(trained.counts, trained.ids, strict=True), key=lambda each: each[0]):
        piece = tokenizer.decode([one for _, one in group], skip_special_tokens=False)
        text += f"⟦{piece}⟧" if counts else piece
    return [f"── {name}: {len(trained.ids)} tokens, {sum(trained.counts)} trained ⟦…⟧", text]


def _divergence(ours: Trained, theirs: Trained, tokenizer: Any) -> list[str]:
    """Where the ids first differ; where they are the same, where what is trained does. The first is never trained."""
    at = next((at for at, pair in enumerate(zip(ours.ids, theirs.ids, strict=False)) if len(set(pair)) > 1), None)
    if at is None and len(ours.ids) != len(theirs.ids):
        at = min(len(ours.ids), len(theirs.ids))
    if at is not None:
        ends = (tokenizer.decode(list(each.ids[at : at + 8])) or "the end" for each in (ours, theirs))
        return ["── the ids differ from token {} on: {!r} here, {!r} there".format(at, *ends)]
    for at, (here, there) in enumerate(zip(ours.counts, theirs.counts, strict=True)):
        if here != there and at > 0:
            where = f"{tokenizer.decode([ours.ids[at]])!r}, token {at}"
            return [f"── the same ids; {where}, is trained {'here' if here else 'there'} only"]
    return ["── the same ids, and the same tokens are trained"]
