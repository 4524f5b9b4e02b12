"""Long conversations: which turns stay, what is trained in them, and when a turn is cut inside."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distft.data.chat_template import ChatTemplate, chat_template
from distft.data.conversations import conversation
from distft.data.named_templates import CHATML, use_template
from distft.data.prepare import prepare_data
from distft.data.templates import Dropped
from distft.data.tokenize import IGNORED, INSIDE, tokenize
from tests.data.chats import recipe_of
from tests.data.rows import ALL, Prepare, write_rows

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def chatml(tokenizer: Any) -> Any:
    found = copy.deepcopy(tokenizer)
    use_template(found, "chatml")
    return found


@pytest.fixture(scope="module")
def template(chatml: Any) -> ChatTemplate:
    return chat_template(recipe_of(), chatml)


def talk(*texts: str) -> list[dict[str, Any]]:
    """Questions and answers in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def shortened(
    template: ChatTemplate, tokenizer: Any, messages: Any, room: int | None, cut: Any = "end"
) -> tuple[list[int], list[int], int, Counter[str]]:
    made = replace(template, room=room, cut=cut).example(conversation(messages, "messages"))
    assert not isinstance(made, Dropped), made
    counts = Counter[str]()
    ((ids, labels, how),) = tokenize([made], tokenizer, room, trained=counts)
    return ids, labels, how, counts


def texts(found: tuple[list[int], list[int], int, Counter[str]], tokenizer: Any) -> tuple[str, str, int]:
    """The text of a sample, its trained part, and how it was cut."""
    ids, labels, how, counts = found
    assert sum(counts.values()) == sum(label != IGNORED for label in labels), "trained tokens are counted by role"
    told = [label for label in labels if label != IGNORED]
    return str(tokenizer.decode(ids)), str(tokenizer.decode(told)), how


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


LONG = [SYSTEM, *talk("One?", "First.", "Two?", "Second.", "Three?", "Third.")]


def test_turns_are_left_out_from_the_end_up_to_an_answer(template: ChatTemplate, chatml: Any) -> None:
    whole = len(shortened(template, chatml, LONG, None)[0])
    text, told, how = texts(shortened(template, chatml, LONG, whole - 1), chatml)
    assert text == "".join(turn(each["role"], each["content"]) for each in LONG[:5])
    assert (told, how) == ("First.<|im_end|>Second.<|im_end|>", 1)
    assert texts(shortened(template, chatml, LONG, whole), chatml)[2] == 0


def test_turns_are_left_out_from_the_beginning_and_the_system_prompt_stays(template: ChatTemplate, chatml: Any) -> None:
    whole = len(shortened(template, chatml, LONG, None)[0])
    text, told, how = texts(shortened(template, chatml, LONG, whole - 1, "beginning"), chatml)
    assert text == "".join(turn(each["role"], each["content"]) for each in [SYSTEM, *LONG[3:]])
    assert (told, how) == ("Second.<|im_end|>Third.<|im_end|>", 1)
    whole = len(shortened(template, chatml, LONG[1:], None)[0])
    text, *_ = texts(shortened(template, chatml, LONG[1:], whole - 1, "beginning"), chatml)
    assert text == "".join(turn(each["role"], each["content"]) for each in LONG[3:])


def test_the_templates_own_system_prompt_stays(tokenizer: Any) -> None:
    qwen = copy.deepcopy(tokenizer)
    use_template(qwen, "qwen2_5")
    found = chat_template(recipe_of(), qwen)
    whole = len(shortened(found, qwen, LONG[1:], None)[0])
    text, told, _ = texts(shortened(found, qwen, LONG[1:], whole - 1, "beginning"), qwen)
    assert text.startswith("<|im_start|>system\nYou are Qwen")
    assert text.endswith("<|im_end|>\n" + "".join(turn(each["role"], each["content"]) for each in LONG[3:]))
    assert told.replace("\n", "") == "Second.<|im_end|>Third.<|im_end|>"


REFUSES = "{%- if not messages|selectattr('role', 'equalto', 'user')|list -%}{{ raise_exception('ask') }}{%- endif -%}"
MOVES = (
    "{%- set first = messages[0] -%}{%- if first.role == 'system' -%}{%- set messages = messages[1:] -%}{%- endif -%}"
)


def test_a_system_prompt_that_the_template_does_not_render_alone_stays_without_the_first_question(chatml: Any) -> None:
    refusing = copy.deepcopy(chatml)
    refusing.chat_template = REFUSES + CHATML
    found = chat_template(recipe_of(), refusing)
    whole = len(shortened(found, refusing, LONG, None)[0])
    text, *_ = texts(shortened(found, refusing, LONG, whole - 1, "beginning"), refusing)
    assert text == "".join(turn(each["role"], each["content"]) for each in [SYSTEM, *LONG[3:]])


@pytest.fixture
def moving(chatml: Any) -> Any:
    """A tokenizer whose template puts the system prompt into the first question."""
    found = copy.deepcopy(chatml)
    found.chat_template = MOVES + CHATML.replace(
        "{{- message['content'] + '<|im_end|>' -}}{%- endif -%}",
        "{{- (first.content + ' ' if loop.first and first.role == 'system' else '') + message['content'] + '<|im_end|>'"
        " -}}{%- endif -%}",
    )
    return found


def test_a_conversation_whose_rest_would_be_rendered_differently_is_not_shortened(moving: Any) -> None:
    found = chat_template(recipe_of(), moving)
    whole = shortened(found, moving, LONG, None)[0]
    assert moving.decode(whole).startswith("<|im_start|>user\nBe brief. One?")
    assert shortened(found, moving, LONG, len(whole) - 1, "beginning")[0] == []
    assert texts(shortened(found, moving, LONG, len(whole) - 1), moving)[1] == "First.<|im_end|>Second.<|im_end|>"


def test_conversations_that_cannot_be_shortened_are_counted_by_themselves(
    prepare: Prepare, moving: Any, tmp_path: Path
) -> None:
    short, deaf = [LONG[0], *LONG[-2:]], talk(" ".join(map(str, range(200))), "Yes.")
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": each} for each in (LONG, LONG, short, deaf)])
    room = len(shortened(chat_template(recipe_of(), moving), moving, LONG, None)[0]) - 1
    words = (f"data.name={file}", "data.chat_template=tokenizer", *ALL, f"training.max_length={room}")
    report = prepare_data(recipe_of(*words, "data.truncation=beginning"), moving).report
    assert (report.rows["train"], report.dropped_untrained["train"], report.uncuttable["train"]) == (1, 3, 2)
    said = "\n".join(report.lines())
    assert "dropped 2 samples above training.max_length: without the first turns, the chat template renders" in said
    assert "dropped 1 sample: training.max_length leaves nothing to train on" in said
    assert prepare_data(recipe_of(*words), moving).report.uncuttable["train"] == 0


# ---- inside a turn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["end", "beginning"])
def test_an_answer_that_is_too_long_by_itself_loses_its_end(template: ChatTemplate, chatml: Any, cut: str) -> None:
    words = " ".join(map(str, range(100)))
    messages = [SYSTEM, *talk("Count.", words)]
    text, told, how = texts(shortened(template, chatml, messages, 40, cut), chatml)
    head = turn("system", "Be brief.") + turn("user", "Count.") + "<|im_start|>assistant\n"
    assert text == head + told and words.startswith(told) and told and how == INSIDE
    if cut == "beginning":  # of several exchanges, the last one
        messages = [SYSTEM, *talk("One?", "First.", "Count.", words)]
        assert texts(shortened(template, chatml, messages, 40, cut), chatml) == (text, told, how)
    else:  # the first one, if another answer fits
        messages = [SYSTEM, *talk("One?", "First.", "Count.", words)]
        assert texts(shortened(template, chatml, messages, 60, cut), chatml)[1:] == ("First.<|im_end|>", 1)


def test_a_question_that_is_too_long_leaves_nothing(template: ChatTemplate, chatml: Any) -> None:
    messages = talk(" ".join(map(str, range(100))), "Yes.")
    for cut in ("end", "beginning"):
        ids, labels, _, counts = shortened(template, chatml, messages, 40, cut)
        assert not ids and not labels and not counts


def test_what_ends_a_turn_as_text_is_not_halved(tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = CHATML.replace("<|im_end|>", "[END-OF-TURN]").replace("<|im_start|>", "@")
    found = chat_template(recipe_of(), plain)
    whole = shortened(found, plain, talk("Hi", "Hello."), None)[0]
    head = len(plain("@user\nHi[END-OF-TURN]\n@assistant\n", add_special_tokens=False)["input_ids"])
    ends = set()
    for room in range(len(whole) - 1, head + 1, -1):
        _, told, how = texts(shortened(found, plain, talk("Hi", "Hello."), room), plain)
        assert how == INSIDE or told == "Hello.[END-OF-TURN]"
        assert "[" not in told.replace("[END-OF-TURN]", ""), told
        ends.add(told)
    assert "Hello." in ends


@pytest.mark.usefixtures("prepare")
def test_long_answers_are_counted_and_said(tokenizer: Any, shared_data: Path) -> None:
    recipe = recipe_of(
        f"data.name={shared_data / 'kto_sample.jsonl'}",
        "data.format.messages=messages",
        *ALL,
        "training.max_length=512",
        "data.chat_template=chatml",
    )
    chatting = copy.deepcopy(tokenizer)
    use_template(chatting, "chatml")
    report = prepare_data(recipe, chatting).report
    inside, cut = report.cut_inside["train"], report.truncated["train"]
    assert 0 < inside < cut and report.rows["train"] + report.dropped_untrained["train"] == 300
    assert report.dropped_untrained["train"] < 50, "only those whose question is too long"
    line = f"data: truncated {cut} samples to training.max_length, {inside} of them inside a turn that is too long"
    assert any(each.startswith(line) for each in report.lines())


# ---- any conversation -----------------------------------------------------------------------------------------------

TURNS = st.lists(st.text("ab 🙂\n", max_size=12), min_size=2, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=TURNS, lead=st.booleans(), share=st.floats(0.1, 1), cut=st.sampled_from(["end", "beginning"]))
def test_any_conversation_is_shortened_to_whole_turns(
    template: ChatTemplate, chatml: Any, said: list[str], lead: bool, share: float, cut: str
) -> None:
    """Ids and labels are those of the whole conversation, in as many turns as fit; a turn is cut only if none does."""
    messages = [SYSTEM] * lead + talk(*(f"«{number}»{text}" for number, text in enumerate(said)))
    all_ids, all_labels, *_ = shortened(template, chatml, messages, None)
    room = max(1, int(len(all_ids) * share))
    ids, labels, how, _ = shortened(template, chatml, messages, room, cut)
    start = chatml.convert_tokens_to_ids("<|im_start|>")
    turns = [place for place, token in enumerate(all_ids) if token == start] + [len(all_ids)]
    assert len(ids) == len(labels) <= room and bool(how) == (room < len(all_ids))
    head = turns[1] if lead else 0
    later = turns[lead:-1:2]
    if not how:
        assert (ids, labels) == (all_ids, all_labels)
        return
    answers = turns[1:][lead + 1 :: 2]
    first, limit = 0, room
    if cut == "beginning" and len(later) > 1:
        fits = [begin for begin in later if head + len(all_ids) - begin <= room]
        first = min(fits) if fits else later[-1]
        limit = first + room - head
        if fits:
            answers = [len(all_ids)]
    else:
        head = 0
    whole = [stop for stop in answers if first < stop <= limit]
    stop = max(whole, default=limit)
    expected = all_ids[:head] + all_ids[first:stop], all_labels[:head] + all_labels[first:stop]
    if any(map(IGNORED.__ne__, all_labels[first:stop])):
        assert (ids, labels) == expected and (how == INSIDE) == (not whole)
    else:
        assert not any(map(IGNORED.__ne__, labels))
