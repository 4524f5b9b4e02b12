"""A judge's text is parsed strictly: a verdict in the required form, or none and the reason."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.evaluation.judge_parsing import opens_reasoning, parse_verdict, reasons_from_the_start

PARSED = [
    ("Feedback: Clear and complete. [RESULT] 4", 4),
    ("Feedback: Clear.\n[RESULT] 4\n", 4),
    ("[RESULT]5", 5),
    ("[RESULT]   1   ", 1),
    ("[RESULT]\n3", 3),
    ("[RESULT]: 2", 2),
    ("[RESULT] = 2", 2),
    ("[Result] 4", 4),
    ("[ RESULT ] 4", 4),
    ("(RESULT) 4", 4),
    ("{RESULT} 4", 4),
    ("<RESULT> 4", 4),
    ("<result>4</result>", 4),
    ("【RESULT】4", 4),
    ("\\[RESULT\\] 4", 4),
    ("**[RESULT]** 4", 4),
    ("**[RESULT] 4**", 4),
    ("**RESULT:** 4", 4),
    ("__[RESULT]__ __4__", 4),
    ("`[RESULT] 4`", 4),
    ("[RESULT] **4**", 4),
    ("[RESULT] [4]", 4),
    ("[RESULT] (4).", 4),
    ("[RESULT] {4}", 4),
    ('[RESULT] "4"', 4),
    ("[RESULT: 4]", 4),
    ("[RESULT 4]", 4),
    ("[RESULT] 4/5", 4),
    ("[RESULT] 4 / 5", 4),
    ("[RESULT] **4**/5", 4),
    ("[RESULT] (4/5)", 4),
    ("[RESULT] 4.", 4),
    ("[RESULT] 4</s>", 4),
    ("[RESULT] 4<|im_end|>", 4),
    ("[RESULT] 4\r\n\r\n###Task Description: grade 2 more", 4),
    ("It names 3 of 10 causes in 2 lines, so not a 5. [RESULT] 2", 2),
    ("[RESULT] 3 [RESULT] 3", 3),
    ("Feedback: ok [RESULT] 3\nFeedback: ok again [RESULT] 3/5", 3),
    ("I write [RESULT] (an integer number between 1 and 5) at the end. [RESULT] 5", 5),
    ("Antwort: falsch, 1945 statt 1954 … 😀 [RESULT] 1", 1),
]

PARSED += [
    ("<think>Perhaps 2.\n[RESULT] 2\nNo, better.</think>\nFeedback: Good. [RESULT] 4", 4),
    ("It seems weak: [RESULT] 2 …\n</think>\n\nFeedback: Good. [RESULT] 4", 4),  # the template opened it
    ("<think>a</think> [RESULT] 2 <think>b</think>Feedback: Good. [RESULT] 4", 4),
    ("<thinking>[RESULT] 2</thinking>[RESULT] 4", 4),
    ("<reasoning>\n[RESULT] 2\n</reasoning>\n[RESULT] 4", 4),
    ("[THINK][RESULT] 2[/THINK][RESULT] 4", 4),
    ("<|channel|>analysis<|message|>[RESULT] 2<|end|><|start|>assistant<|channel|>final<|message|>[RESULT] 4", 4),
    ("Feedback: The response shows its `<think>` tag to the user. [RESULT] 2", 2),
]

UNPARSED = [
    ("<think>I lean to\n[RESULT] 2\nbut", "its reasoning has no end (<think>)"),
    ("<thinking>\n[RESULT] 2", "its reasoning has no end (<thinking>)"),
    ("<think>a</think>\n<think>\n[RESULT] 2", "its reasoning has no end"),
    ("<think>Clearly [RESULT] 2</think>\n", "nothing after </think>"),
    ("", "nothing"),
    (" \n\t", "nothing"),
    ("Feedback: The response is good, I would give it 4 of 5.", "no [RESULT]"),
    ("4", "no [RESULT]"),
    ("Score: 4/5", "no [RESULT]"),
    ("Result: 4", "no [RESULT]"),
    ("RESULT 4", "no [RESULT]"),
    ("[RESULTS] 4", "no [RESULT]"),
    ("[SCORE] 4", "no [RESULT]"),
    ("Feedback: The response is go", "no [RESULT]"),
    ("Feedback: good. [RESU", "cut off inside"),
    ("Feedback: good. **[RES", "cut off inside"),
    ("Feedback: good. [RESULT]", "cut off after"),
    ("Feedback: good. **[RESULT]** ", "cut off after"),
    ("[RESULT] 4 and then [RESULT]", "cut off after"),
    ("[RESULT] 4.5", "4.5"),
    ("[RESULT] 4,5", "4,5"),
    ("[RESULT] 4½", "4½"),
    ("[RESULT] 0", "'0'"),
    ("[RESULT] 6", "'6'"),
    ("[RESULT] 11", "11"),
    ("[RESULT] 45", "45"),
    ("[RESULT] 04", "04"),
    ("[RESULT] 4.0", "4.0"),
    ("[RESULT] -4", "-4"),
    ("[RESULT] ~4", "~4"),
    ("[RESULT] 4+", "4+"),
    ("[RESULT] 4-5", "4-5"),
    ("[RESULT] 4 or 5", "4 or 5"),
    ("[RESULT] 4, 5", "4, 5"),
    ("[RESULT] 4/10", "4/10"),
    ("[RESULT] 4/50", "4/50"),
    ("[RESULT] 4/5.5", "4/5.5"),
    ("[RESULT] 4 out of 10", "out of 10"),
    ("[RESULT] 80%", "80%"),
    ("[RESULT] 4 of the 5 criteria are met", "criteria"),
    ("[RESULT]\n1. The response is clear\n2. It is short", "1. The response"),
    ("[RESULT] four", "four"),
    ("[RESULT] ４", "４"),  # full-width digit
    ("[RESULT] IV", "IV"),
    ("[RESULT] (an integer number between 1 and 5)", "an integer"),
    ("[RESULT] N/A", "N/A"),
    ("[RESULT] A", "'A'"),
    ("[RESULT] 4 [RESULT] 5", "conflicting results: 4, 5"),
    ("[RESULT] 4\nOn reflection:\n[RESULT] 2", "conflicting results: 4, 2"),
    ("[RESULT] 4.5 … rounded: [RESULT] 4", "conflicting results: 4.5, 4"),
    ("[RESULT] 3 [RESULT] 4 [RESULT] 3", "conflicting"),
]


@pytest.mark.parametrize(("text", "grade"), PARSED)
def test_a_grade_in_the_required_form_is_parsed(text: str, grade: int) -> None:
    verdict = parse_verdict(text, "grade")
    assert (verdict.value, verdict.reason) == (grade, None)


@pytest.mark.parametrize(("text", "reason"), UNPARSED)
def test_anything_else_is_unparsed_for_a_reason(text: str, reason: str) -> None:
    verdict = parse_verdict(text, "grade")
    assert verdict.value is None
    assert verdict.reason is not None and reason in verdict.reason


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Feedback: A is longer, B is right. [RESULT] B", "B"),
        ("[RESULT] A", "A"),
        ("**[RESULT]** (B)", "B"),
        ("[RESULT]: **A**.", "A"),
        ("[RESULT: A]", "A"),
        ("[RESULT] A\n[RESULT] A", "A"),
        ('Output "[RESULT] (A or B)". [RESULT] B', "B"),
        ("[RESULT] A [RESULT] B", None),
        ("[RESULT] a", None),
        ("[RESULT] A tie", None),
        ("[RESULT] A better answer is B", None),
        ("[RESULT] AB", None),
        ("[RESULT] A/B", None),
        ("[RESULT] A or B", None),
        ("[RESULT] C", None),
        ("[RESULT] tie", None),
        ("[RESULT] 4", None),
        ("[RESULT] Response B", None),
        ("I prefer A", None),
        ("[RESULT]", None),
        ("", None),
    ],
)
def test_preferences_are_parsed_just_as_strictly(text: str, value: str | None) -> None:
    verdict = parse_verdict(text, "preference")
    assert verdict.value == value
    assert (verdict.reason is None) == (value is not None)


def test_a_verdict_at_which_the_text_is_cut_off_does_not_count() -> None:
    assert parse_verdict("[RESULT] 4", "grade", finished=False).reason == "cut off at the verdict"
    assert parse_verdict("[RESULT] 4.", "grade", finished=False).value is None
    assert parse_verdict("[RESULT] 4\nAlso", "grade", finished=False).value == 4
    assert parse_verdict("Feedback: so", "grade", finished=False).reason == "cut off before [RESULT]"


prose = st.text(max_size=300).filter(lambda text: not re.search("result", text, re.IGNORECASE))
around = st.sampled_from(["", " ", "  ", "**", "* ", "`", "\t"])


@given(prose, st.sampled_from(["[]", "()", "{}", "<>", "【】"]), around, around, st.integers(1, 5), st.booleans())
def test_text_before_a_grade_does_not_change_it(
    before: str, brackets: str, inside: str, between: str, grade: int, as_fraction: bool
) -> None:
    marker = f"{brackets[0]}{inside}RESULT{inside}{brackets[1]}"
    text = f"{before}{marker}{between}{grade}{'/5' if as_fraction else ''}"
    assert parse_verdict(text, "grade").value == grade


@given(prose)
def test_a_text_without_the_marker_has_no_verdict(text: str) -> None:
    assert parse_verdict(text, "grade").value is None
    assert parse_verdict(text, "preference").value is None


@given(prose, st.integers().filter(lambda number: not 1 <= number <= 5))
def test_no_other_number_becomes_a_grade(before: str, number: int) -> None:
    assert parse_verdict(f"{before}[RESULT] {number}", "grade").value is None


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), prose)
def test_several_results_count_only_if_they_agree(grades: list[int], between: str) -> None:
    text = "\n".join(f"[RESULT] {grade}\n{between}" for grade in grades)
    assert parse_verdict(text, "grade").value == (grades[-1] if len(set(grades)) == 1 else None)


@given(st.text(alphabet="[](){}<>*_ \nRESULTresult0123456789./AB-", max_size=60))
def test_every_text_gives_a_verdict_or_a_reason(text: str) -> None:
    for kind, allowed in (("grade", {1, 2, 3, 4, 5}), ("preference", {"A", "B"})):
        verdict = parse_verdict(text, kind)  # type: ignore[arg-type]
        assert (verdict.value is None) == (verdict.reason is not None)
        assert verdict.value is None or verdict.value in allowed


def test_a_text_cut_off_in_its_reasoning_has_no_verdict() -> None:
    assert (
        parse_verdict("<think>\n[RESULT] 2\nbut", "grade", finished=False).reason
        == "cut off in its reasoning (<think>)"
    )
    begun = "It seems weak.\n[RESULT] 2\nHowever,"
    assert parse_verdict(begun, "grade", finished=False).value == 2
    assert parse_verdict(begun, "grade", finished=False, reasoning=True).value is None
    assert parse_verdict(f"{begun}</think>[RESULT] 4", "grade", reasoning=True).value == 4
    assert opens_reasoning("<|im_start|>assistant\n<think>\n") and opens_reasoning("<｜Assistant｜><think>\n")
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n") and not opens_reasoning("###Feedback:")
    assert reasons_from_the_start("a </think> b") and not reasons_from_the_start("<think>a</think> b")
