"""The judge is asked in the form it knows, again if its verdict cannot be parsed, and otherwise once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import load_recipe
from distft.errors import JudgeError
from distft.evaluation.judge import RUBRIC, Judgement, Question, count, judge_all, out_of_ten
from distft.evaluation.target import Target
from distft.files import read_lines
from tests.evaluation.conftest import evaluation

Replay = Callable[..., Any]


def grade(number: int, reference: str | None = None) -> Question:
    return Question(f"Instruction {number}", (f"Response {number}",), {"number": number}, reference)


QUESTIONS = [grade(number) for number in range(4)]


def by_endpoint(address: str, **judge: Any) -> Any:
    return evaluation(judge={"endpoint": address, "model": "recorded", "concurrency": 2, "retries": 0, **judge})


def test_the_prompt_for_a_grade_has_everything_it_depends_on() -> None:
    prompt = grade(7, "A better one").prompt("The rubric")
    parts = [
        "###Task Description:",
        "###The instruction to evaluate:\nInstruction 7",
        "###Response to evaluate:\nResponse 7",
        "###Reference Answer (Score 5):\nA better one",
        "###Score Rubrics:\nThe rubric",
        "###Feedback:",
    ]
    places = [prompt.index(part) for part in parts]
    assert places == sorted(places) and prompt.endswith("###Feedback:")
    assert "[RESULT] (an integer from 1 to 5)" in prompt
    assert "Reference" not in grade(7).prompt("The rubric") and "reference" not in grade(7).prompt("The rubric")


def test_the_prompt_for_a_comparison_shows_both_responses() -> None:
    question = Question("Say {something}.", ("First {0}", "Second"), {})
    prompt = question.prompt(RUBRIC)
    assert "###Instruction:\nSay {something}.\n\n###Response A:\nFirst {0}\n\n###Response B:\nSecond\n" in prompt
    assert "[RESULT] (A or B)" in prompt and question.kind == "preference"


def test_the_rubric_has_a_line_for_each_grade() -> None:
    assert [line.split(":")[0] for line in RUBRIC.splitlines()[1:]] == [f"Score {number}" for number in range(1, 6)]


def test_an_unparsable_verdict_is_asked_for_again_and_finally_counted(
    target: Target, tmp_path: Path, replay: Replay
) -> None:
    """Question 0 is graded at once, 1 at the second attempt, 2 at the third, 3 never."""
    times: dict[str, int] = {}

    def says(body: dict[str, Any], _: int) -> tuple[int, str]:
        number = next(number for number in range(4) if f"Instruction {number}" in body["messages"][0]["content"])
        times[str(number)] = times.get(str(number), 0) + 1
        return 200, f"Feedback: 4 of 5. [RESULT] {number + 2}" if times[str(number)] > number else "I would say 4 of 5."

    server = replay(says)
    found = judge_all(QUESTIONS, target, by_endpoint(server.address, attempts=3), tmp_path)
    assert [judgement.value for judgement in found] == [2, 3, 4, None]
    assert [judgement.attempts for judgement in found] == [1, 2, 3, 3]
    assert found[3].reason == "no [RESULT]"
    assert count(found) == {"judgements": 4, "unparsed": 1, "asked_again": 3}
    assert times == {"0": 1, "1": 2, "2": 3, "3": 3}

    temperatures = [body["temperature"] for body in server.bodies if "Instruction 3" in body["messages"][0]["content"]]
    seeds = [body["seed"] for body in server.bodies if "Instruction 3" in body["messages"][0]["content"]]
    assert temperatures == [0.0, 0.7, 0.7] and len(set(seeds)) == 3

    records = read_lines(tmp_path / "judgements.jsonl")
    assert [record["number"] for record in records] == [0, 1, 2, 3]
    last = records[3]
    assert (last["verdict"], last["reason"], last["rubric"]) == (None, "no [RESULT]", RUBRIC)
    assert last["prompt"] == QUESTIONS[3].prompt(RUBRIC)
    assert last["judge"] == {
        "engine": "endpoint",
        "model": "recorded",
        "revision": None,
        "mode": "absolute",
        "endpoint": f"{server.address}/chat/completions",
    }
    assert [attempt["output"] for attempt in last["attempts"]] == ["I would say 4 of 5."] * 3
    assert [attempt["sampling"]["temperature"] for attempt in last["attempts"]] == [0.0, 0.7, 0.7]


def test_only_what_follows_the_reasoning_of_a_judge_counts(target: Target, tmp_path: Path, replay: Replay) -> None:
    messages: list[tuple[dict[str, Any], str]] = [
        ({"content": "I lean to\n[RESULT] 2\n…</think>\nFeedback: Good. [RESULT] 4"}, "stop"),
        ({"content": [{"type": "text", "text": "Feedback: Good."}, {"type": "text", "text": " [RESULT] 5"}]}, "stop"),
        ({"content": None, "reasoning_content": "Good. [RESULT] 3"}, "stop"),
        ({"content": "I lean to\n[RESULT] 2\nbut"}, "length"),  # reasoning too, as the end of the first one's shows
    ]

    def says(body: dict[str, Any], _: int) -> dict[str, Any]:
        number = next(number for number in range(4) if f"Instruction {number}" in body["messages"][0]["content"])
        return {"choices": [{"message": messages[number][0], "finish_reason": messages[number][1]}]}

    server = replay(says)
    for _ in range(2):  # the second time from the cache
        found = judge_all(QUESTIONS, target, by_endpoint(server.address, attempts=1), tmp_path)
        assert [judgement.value for judgement in found] == [4, 5, None, None]
        assert found[2].reason == "the answer is in reasoning_content, and content is empty"
        assert found[3].reason == "cut off in its reasoning (<think>)"
    assert len(server.bodies) == 4


def test_cached_judgements_cost_nothing(target: Target, tmp_path: Path, replay: Replay) -> None:
    server = replay(lambda body, number: (200, "[RESULT] 5" if number % 2 else "Hm."))
    settings = by_endpoint(server.address, attempts=2)
    first = judge_all(QUESTIONS, target, settings, tmp_path)
    asked = len(server.bodies)
    assert judge_all(QUESTIONS, target, settings, tmp_path) == first
    elsewhere = settings.model_copy(
        update={"judge": settings.judge.model_copy(update={"endpoint": "http://127.0.0.1:1/v1"})}
    )
    assert judge_all(QUESTIONS, target, elsewhere, tmp_path) == first
    assert len(server.bodies) == asked
    other = settings.model_copy(update={"judge": settings.judge.model_copy(update={"model": "another"})})
    judge_all(QUESTIONS, target, other, tmp_path)
    assert len(server.bodies) > asked


def test_an_interrupted_judge_continues_where_it_stopped(target: Target, tmp_path: Path, replay: Replay) -> None:
    server = replay(lambda body, number: (200, "[RESULT] 4") if number != 2 else (400, "broken"))
    settings = by_endpoint(server.address, concurrency=1)
    with pytest.raises(JudgeError, match="400"):
        judge_all(QUESTIONS, target, settings, tmp_path)
    done = server.prompts[:2]
    found = judge_all(QUESTIONS, target, settings, tmp_path)
    assert [judgement.value for judgement in found] == [4] * 4
    assert all(server.prompts.count(prompt) == 1 for prompt in done)


def test_no_key_is_written_anywhere(
    target: Target, tmp_path: Path, replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret")
    server = replay(lambda body, number: (200, "[RESULT] 4"))
    address = server.address.replace("http://", "http://me:hidden@")
    judge_all(QUESTIONS, target, by_endpoint(address), tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2
    for file in files:
        text = file.read_text()
        assert "sk-a-secret" not in text and "hidden" not in text


def test_a_local_judge_is_a_model_like_any_other(target: Target, tmp_path: Path, chat_model: Path) -> None:
    """The tiny model writes nothing useful: every verdict is unparsed, and everything it wrote is kept."""
    settings = evaluation(
        judge={
            "model": str(chat_model),
            "max_new_tokens": 12,
            "attempts": 2,
            "retry_temperature": 4.0,
            "dtype": "float32",
        }
    )
    found = judge_all(QUESTIONS[:2], target, settings, tmp_path)
    assert [(judgement.value, judgement.attempts) for judgement in found] == [(None, 2)] * 2
    records = read_lines(tmp_path / "judgements.jsonl")
    for record in records:
        assert record["judge"]["engine"] == "transformers" and record["judge"]["template"] == "chat"
        assert len(record["judge"]["revision"]) == 16 and record["judge"]["dtype"] == "float32"
        outputs = [attempt["output"] for attempt in record["attempts"]]
        assert len(outputs) == 2 and all(outputs) and outputs[0] != outputs[1]
    before = (tmp_path / "judge_answers.jsonl").read_bytes()
    assert judge_all(QUESTIONS[:2], target, settings, tmp_path) == found
    assert (tmp_path / "judge_answers.jsonl").read_bytes() == before


def test_a_local_judge_in_4_bits_judges_too(target: Target, tmp_path: Path, chat_model: Path) -> None:
    settings = evaluation(judge={"model": str(chat_model), "max_new_tokens": 3, "attempts": 1, "load_in_4bit": True})
    judge_all(QUESTIONS[:1], target, settings, tmp_path)
    (record,) = read_lines(tmp_path / "judgements.jsonl")
    assert record["judge"]["bits"] == 4 and record["attempts"][0]["output"]


def test_a_missing_judge_is_named_with_its_remedies(target: Target, tmp_path: Path) -> None:
    name = "distft-tests/there-is-no-such-judge"
    with pytest.raises(JudgeError, match=f"the judge {name} cannot be loaded") as caught:
        judge_all(QUESTIONS, target, evaluation(judge=name), tmp_path)
    assert "evaluation.judge.model=FOLDER" in str(caught.value) and "evaluation.judge.endpoint" in str(caught.value)
    assert f"hf download {name}" in str(caught.value)
    with pytest.raises(
        JudgeError, match="the judge /no/judge cannot be loaded: there is no folder /no/judge\n"
    ) as caught:
        judge_all(QUESTIONS, target, evaluation(judge="/no/judge"), tmp_path)
    assert "hf download" not in str(caught.value) and "(model.name)" not in str(caught.value)


def test_a_judge_given_by_name_keeps_its_other_settings(tmp_path: Path) -> None:
    words = ["evaluation.judge=some/judge", "evaluation.judge.mode=pairwise"]
    file = tmp_path / "mine.yaml"
    file.write_text("extends: tiny\nevaluation: {judge: some/judge}\n")
    for given in (words, words[::-1], [f"recipe={file}", words[1]]):
        judge = load_recipe(given).evaluation.judge
        assert (judge.model, judge.mode) == ("some/judge", "pairwise")


def test_a_rubric_from_a_file(target: Target, tmp_path: Path, replay: Replay) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text("[Is it polite?]\n" + "\n".join(f"Score {number}: polite {number}" for number in range(1, 6)))
    server = replay(lambda body, number: (200, "[RESULT] 2"))
    judge_all(QUESTIONS[:1], target, by_endpoint(server.address, rubric=str(file)), tmp_path / "judged")
    assert "[Is it polite?]\nScore 1: polite 1" in server.prompts[0]
    file.write_text("Score 1: bad\nScore 5: good")
    with pytest.raises(JudgeError, match="lacks Score 2:, Score 3:, Score 4:"):
        judge_all(QUESTIONS[:1], target, by_endpoint(server.address, rubric=str(file)), tmp_path / "judged")
    with pytest.raises(JudgeError, match="cannot be read"):
        judge_all(
            QUESTIONS[:1], target, by_endpoint(server.address, rubric=str(tmp_path / "none")), tmp_path / "judged"
        )


def test_scores_are_twice_the_grade() -> None:
    assert [out_of_ten(value) for value in (1, 5, None, "A")] == [2.0, 10.0, None, None]
    assert count([Judgement(1, None, 1), Judgement(None, "no [RESULT]", 3)]) == {
        "judgements": 2,
        "unparsed": 1,
        "asked_again": 1,
    }


def test_a_judge_is_a_name_or_a_mapping_and_evaluation_may_change_on_resume() -> None:
    from distft.runs.resume import FREE_TO_CHANGE, differences

    named = load_recipe(["evaluation.judge=prometheus-eval/prometheus-7b-v2.0", "evaluation.tasks=[mt_bench]"])
    mapped = load_recipe(["evaluation.judge={model: a/b, endpoint: 'http://127.0.0.1:8000/v1'}"])
    assert named.evaluation.judge.model == "prometheus-eval/prometheus-7b-v2.0"
    assert mapped.evaluation.judge.endpoint == "http://127.0.0.1:8000/v1"
    assert "evaluation." in FREE_TO_CHANGE
    assert not list(differences(load_recipe([]).model_dump(), named.model_dump()))
