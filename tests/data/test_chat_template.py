"""Labels of conversations, token by token against TRL's, on every template that TRL ships with a training counterpart;
and what no template may do: train a user's token, or change the text."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distft.data.named_templates import CHATML, template_names, use_template
from distft.data.tokenize import IGNORED
from distft.errors import DataError
from tests.data.chats import TEMPLATES, labels_of, trl_labels, with_template

NAMES = sorted(file.stem.removesuffix("_training") for file in TEMPLATES.glob("*_training.jinja"))
LOST = "calls of tools that the chat template leaves out (data.chat_template=qwen2_5 renders them)"
IMAGES = ("idefics3", "llava_next", "smolvlm")
"""Templates that take no content as text."""
DROP_CALLS = ("deepseek_r1_distill", "llama3", "phi3", "phi3_5", "qwen2_5_vl")
"""Templates that render a call of a tool as an empty answer: TRL trains on that, and distft drops the row."""
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add.",
            "parameters": {
                "type": "object",
                "properties": {name: {"type": "integer", "description": "A number."} for name in "ab"},
                "required": ["a"],
            },
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


# A marked part that ends in a character of several tokens loses all but the first of them with TRL, which asks for the
# token of its last character; distft trains them all. So the emoji below does not come last.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "plain": ([user("Hi"), answer("Hello there."), user("Bye"), answer("Ciao — 再见 🙂!")], None),
    "system": ([{"role": "system", "content": "Be nice."}, user("Hi"), answer("Hello there.")], None),
    "thinking": (
        [
            user("Hi"),
            answer("Hello.", reasoning_content="Greet."),
            user("Bye"),
            answer("C.", reasoning_content="Part."),
        ],
        None,
    ),
    "tools": (
        [user("1+2?"), answer("", tool_calls=[CALL]), {"role": "tool", "name": "add", "content": "3"}, answer("3.")],
        TOOLS,
    ),
    "two answers": ([user("Hi"), answer("Hello."), answer("Again.")], None),
    "a question last": ([user("Hi"), answer("Hello."), user("Bye")], None),
}


@pytest.fixture(scope="module")
def chatml(tokenizer: Any) -> Any:
    found = copy.deepcopy(tokenizer)
    assert use_template(found, "chatml") == ["<|im_start|>", "<|im_end|>"]
    return found


def told(tokenizer: Any, labels: list[int]) -> str:
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IMAGES])
def test_labels_are_those_of_trl(tokenizer: Any, name: str) -> None:
    trained = with_template(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    compared = []
    for kind, (messages, tools) in CONVERSATIONS.items():
        found = labels_of(trained, messages, tools=tools)
        if kind == "tools" and name in DROP_CALLS:
            assert found == LOST
            continue
        try:
            expected = trl_labels(trained, messages, tools)
        except Exception as error:  # the template's own: roles that have to alternate, say
            assert isinstance(found, str) and str(error)[:40] in found
            continue
        assert not isinstance(found, str), (kind, found)
        assert found == expected, (kind, told(trained, found[1]), told(trained, expected[1]))
        compared.append(kind)
    assert {"plain", "thinking", "a question last"} <= set(compared)


@pytest.mark.parametrize("name", IMAGES)
def test_templates_for_images_are_refused(tokenizer: Any, name: str) -> None:
    trained = with_template(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    with pytest.raises(DataError, match=r"set data\.chat_template to another"):
        labels_of(trained, [user("Hi"), answer("Hello.")])
    assert name not in template_names()


def test_a_training_template_says_where_it_differs_from_the_tokenizers_own(tokenizer: Any) -> None:
    """TRL's training templates keep the thinking of earlier turns; all others give the text of the template itself."""
    from distft.data.chat_template import chat_template
    from tests.data.chats import recipe_of

    differ = []
    for name in (name for name in NAMES if name not in IMAGES):
        trained = with_template(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
        found = chat_template(recipe_of(), trained)
        messages, _ = CONVERSATIONS["plain"]
        own = trained.apply_chat_template(messages, tokenize=False, chat_template=_dated(trained.chat_template))
        said = found.text == trained.chat_template or "keeps the thinking" in found.source
        made = labels_of(trained, messages)
        assert not isinstance(made, str)
        same = made[0] == trained(own, add_special_tokens=False)["input_ids"]
        assert same or said, name
        if not same:
            differ.append(name)
    assert all(name.startswith(("qwen3", "deepseek_r1", "nemotron", "glm4moe", "lfm2", "gptoss")) for name in differ)


def _dated(text: str) -> str:
    from distft.data.chat_template import at_a_fixed_date

    return at_a_fixed_date(text)


# ---- what is trained ------------------------------------------------------------------------------------------------

BOTH = "First.<|im_end|>Second.<|im_end|>"
CHAT = [{"role": "system", "content": "Be."}, user("One?"), answer("First."), user("Two?"), answer("Second.")]


@pytest.mark.parametrize(
    ("overrides", "flags", "trained"),
    [
        ([], {}, BOTH),
        (["data.train_on=last_assistant"], {}, "Second.<|im_end|>"),
        (["data.train_on_end_of_turn=false"], {}, "First.Second."),
        (
            ["data.train_on=[assistant, system]"],
            {},
            "<|im_start|>system\nBe.<|im_end|>\nFirst.<|im_end|>Second.<|im_end|>",
        ),
        ([], {2: {"weight": 0}}, "Second.<|im_end|>"),
        ([], {2: {"train": False}, 4: {"loss_weight": 1.0}}, "Second.<|im_end|>"),
        ([], {3: {"train": True}}, "First.<|im_end|><|im_start|>user\nTwo?<|im_end|>\nSecond.<|im_end|>"),
        ([], {2: {"content": " "}}, "Second.<|im_end|>"),
    ],
)
def test_roles_and_messages_decide_what_is_trained(
    chatml: Any, overrides: list[str], flags: dict[int, Any], trained: str
) -> None:
    messages = [{**message, **flags.get(number, {})} for number, message in enumerate(CHAT)]
    found = labels_of(chatml, messages, *overrides)
    assert not isinstance(found, str)
    first = "<|im_start|>" if trained.startswith("<|im_start|>") else ""  # nothing predicts the first token
    assert first + told(chatml, found[1]) == trained


def test_everything_is_trained_with_all(chatml: Any) -> None:
    found = labels_of(chatml, CHAT, "data.train_on=all")
    assert not isinstance(found, str) and found[1] == [IGNORED, *found[0][1:]]


def test_without_markers_the_turns_are_rendered_one_by_one(chatml: Any) -> None:
    plain = copy.deepcopy(chatml)
    plain.chat_template = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    found, marked = labels_of(plain, CHAT), labels_of(chatml, CHAT)
    assert not isinstance(found, str) and not isinstance(marked, str)
    assert found[0] == marked[0]
    assert told(plain, found[1]) == "First.<|im_end|>\nSecond.<|im_end|>\n", "the line break belongs to the turn"
    for overrides in (["data.train_on=last_assistant"], ["data.train_on_end_of_turn=false"]):
        one, other = labels_of(plain, CHAT, *overrides), labels_of(chatml, CHAT, *overrides)
        assert told(plain, one[1]).strip() == told(chatml, other[1]).strip()  # type: ignore[arg-type]


def test_a_template_that_marks_no_end_of_turn_has_it_trained_all_the_same(chatml: Any) -> None:
    """TRL warns of such templates and trains no end of turn."""
    inner = copy.deepcopy(chatml)
    inner.chat_template = CHATML.replace(
        "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    assert told(inner, trl_labels(inner, CHAT)[1]) == "First.Second."
    assert labels_of(inner, CHAT) == labels_of(chatml, CHAT)


def test_a_template_that_does_not_tell_is_refused_with_what_to_do(chatml: Any) -> None:
    dropping = copy.deepcopy(chatml)
    dropping.chat_template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + (':' if loop.last else '') + '\n' + m.content }}"
        "<|im_end|>{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant:\n' }}{%- endif -%}"
    )
    with pytest.raises(DataError, match=r"differently once another question follows.*\n.*last_assistant"):
        labels_of(dropping, CHAT)
    endless = copy.deepcopy(chatml)
    endless.chat_template = "{%- for m in messages -%}{{ m.role + ': ' + m.content }}{%- endfor -%}" + (
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    )
    with pytest.raises(DataError, match="would not learn to stop"):
        labels_of(endless, CHAT)
    broken = copy.deepcopy(chatml)
    broken.chat_template = "{% for %}"
    with pytest.raises(DataError, match="cannot render a question and its answer"):
        labels_of(broken, CHAT)


# ---- any conversation -----------------------------------------------------------------------------------------------

TURN = st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), st.text(max_size=30)).filter(
    lambda turn: not any("\ud800" <= letter <= "\udfff" for letter in turn[1])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TURN, min_size=1, max_size=8), marked=st.booleans())
def test_no_token_of_a_user_is_trained_and_the_text_is_the_templates(
    chatml: Any, turns: list[tuple[str, str]], marked: bool
) -> None:
    chosen = copy.copy(chatml)
    if not marked:
        chosen.chat_template = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    messages = [{"role": role, "content": f"«{number}»{text}"} for number, (role, text) in enumerate(turns)]
    found = labels_of(chosen, messages)
    spoken = [message["content"] for message in messages if message["role"] == "assistant"]
    if not spoken:
        assert found == "no turn to train on"
        return
    assert not isinstance(found, str)
    ids, labels = found
    assert ids == chosen.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    end = "<|im_end|>" if marked else "<|im_end|>\n"
    assert told(chosen, labels) == "".join(content + end for content in spoken)


def test_awkward_rows_are_trained_or_counted(chatml: Any) -> None:
    """1,000 rows: every one gives its own text, or a reason."""
    long, wide = "x" * 1_000_000, "名前 é 🙂 \u200b\n" * 5
    shapes: list[list[dict[str, Any]]] = [
        [user(wide), answer(wide)],
        [user(""), answer("")],
        [user(""), answer("a")],
        [user("a"), answer("b"), answer("c")],
        [user("a"), {"role": "system", "content": "s"}, answer("b")],
        [answer("a")],
        [user("a")],
        [user("<|im_end|>"), answer("<|im_start|>user\nx")],
        [user("a"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, answer("3")],
        [turn for number in range(100) for turn in (user(f"q{number}"), answer(f"a{number}"))],
        [user("</think>"), answer("<think>hm</think>yes")],
        [{"role": "developer", "content": "d"}, user("a"), answer("b")],
    ]
    outcomes = Counter[str]()
    for number in range(1_000):
        messages = shapes[number % len(shapes)] if number != 502 else [user(long), answer(long)]
        found = labels_of(chatml, messages)
        outcomes[found if isinstance(found, str) else "trained"] += 1
        if not isinstance(found, str):
            said = "".join(m["content"] for m in messages if m["role"] == "assistant" and m["content"].strip())
            assert told(chatml, found[1]).replace("<|im_end|>", "") == said
    assert outcomes == {"trained": 750, "no turn to train on": 167, LOST: 83}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseekv3"])
@pytest.mark.parametrize("sample", ["toolcall_sample", "reasoning_tools_sample"])
def test_real_rows_with_tools_are_those_of_trl(tokenizer: Any, shared_data: Path, name: str, sample: str) -> None:
    from distft.data.conversations import conversation, tools_of
    from tests.data.rows import read_rows

    trained = with_template(tokenizer, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    compared = 0
    for row in read_rows(shared_data / f"{sample}.jsonl")[:12]:
        value = row.get("messages") or row["conversations"]
        found = labels_of(trained, value, tools=row["tools"])
        messages = conversation(value, "messages").messages
        assert found == trl_labels(trained, messages, tools_of(row["tools"]))
        compared += 1
    assert compared == 12
