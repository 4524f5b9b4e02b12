"""Two turns, the second of which sees the first; each judged individually; means over questions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.errors import DataError
from distft.evaluation.judge import Judgement
from distft.evaluation.summary import detail_lines, warnings
from distft.evaluation.target import Target
from distft.evaluation.tasks.mt_bench import TASK, TEMPERATURE, TwoTurns, read_questions, summarise
from distft.files import read_lines, to_json
from tests.evaluation.conftest import evaluation

Replay = Callable[..., Any]

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["Write two lines about a lighthouse.", "Make them rhyme."]},
    {
        "question_id": 2,
        "category": "math",
        "turns": ["What is 17 times 3?", "And half of that?"],
        "reference": ["51", "25.5"],
    },
    {
        "question_id": 3,
        "category": "humanities",
        "turns": ["Why did towns grow at rivers?", "Name a town that did not."],
    },
    {"question_id": 4, "category": "gardening", "turns": ["When are beans sown?", "And in a cold year?"]},
    {
        "question_id": 5,
        "category": "math",
        "turns": ["Is 91 prime?", "Which primes make it up?"],
        "reference": ["No", "7 and 13"],
    },
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return file


def settings_for(questions: Path, address: str, **sections: Any) -> Any:
    return evaluation(
        mt_bench={"questions": str(questions)},
        generation={"max_new_tokens": 10},
        judge={"endpoint": address, "model": "recorded", "retries": 0, "attempts": 1},
        **sections,
    )


def test_the_temperatures_are_those_of_the_benchmark() -> None:
    assert TEMPERATURE == {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }


def test_questions_are_read_as_the_benchmark_writes_them(questions: Path) -> None:
    found = read_questions(questions)
    assert found[1] == TwoTurns(2, "math", ("What is 17 times 3?", "And half of that?"), ("51", "25.5"))
    assert found[0].reference == ()
    assert read_questions(questions, limit=2) == found[:2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no questions"),
        ("{]", "line 1 is not a question"),
        ('{"question_id": 1, "category": "math"}', "line 1 lacks turns: a question of MT-Bench has question_id"),
        ('{"question_id": 1, "category": "math", "turns": ["One"]}', "2 turns"),
        ('{"question_id": 1, "category": "math", "turns": "ab"}', "2 turns"),
        ('{"question_id": 1, "category": null, "turns": ["One", "Two"]}', "all of them text"),
        ('{"question_id": 1, "category": "math", "turns": ["One", "Two"]}\n' * 2, "question_id 1 more than once"),
    ],
)
def test_a_malformed_file_is_reported_with_the_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=says):
        read_questions(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_means_are_over_questions_and_unparsed_verdicts_are_counted() -> None:
    asked = [TwoTurns(number, category, ("One", "Two")) for number, category in enumerate(["math", "math", "stem"])]
    values = {"base": [1, 2, 4, None, None, None], "adapter": [3, 4, 5, 5, 2, None]}
    given = {
        side: [Judgement(value, None if value else "no [RESULT]", 1) for value in found]
        for side, found in values.items()
    }
    found = summarise(asked, given, evaluation())  # type: ignore[arg-type]
    score = found["figures"]["score"]
    assert score["base"]["value"] == pytest.approx((3 + 8) / 2)  # the third has no score
    assert score["adapter"]["value"] == pytest.approx((7 + 10 + 4) / 3)
    assert score["difference"]["value"] == pytest.approx((4 + 2) / 2)  # over those that have one on both sides
    assert score["base"]["low"] <= score["base"]["value"] <= score["base"]["high"]
    assert found["figures"]["turn_1"]["base"]["value"] == pytest.approx((2 + 8) / 2)
    assert found["figures"]["turn_2"]["adapter"]["value"] == pytest.approx((8 + 10) / 2)
    assert found["figures"]["unparsed"]["base"]["value"] == pytest.approx(3 / 6)
    assert found["judged"]["adapter"] == {"judgements": 6, "unparsed": 1, "asked_again": 0}
    assert found["reasons"] == {"no [RESULT]": 4}
    assert warnings("mt_bench", found, "") == [], "half of the base's are not most"
    assert detail_lines("mt_bench", found)[0].startswith(
        "mt_bench: score out of 10 by category: math: questions 2, base 5.50 ["
    )
    assert found["figures"]["score"]["verdict"] == "too few items"
    assert list(found["categories"]) == ["math", "stem"]
    assert found["categories"]["math"]["count"] == 2
    assert found["categories"]["math"]["adapter"]["value"] == pytest.approx(8.5)
    assert json.loads(to_json(found))["categories"]["stem"]["base"]["value"] is None


def test_both_sides_answer_both_turns_and_each_answer_gets_its_judgement(
    target: Target, tmp_path: Path, questions: Path, replay: Replay
) -> None:
    """The replayed judge grades by the length of the response, so the expected figures follow from the records."""

    def says(body: dict[str, Any], _: int) -> tuple[int, str]:
        response = re.search(r"Response to evaluate:\n(.*?)\n+(?=###\w)", body["messages"][0]["content"], re.DOTALL)
        assert response is not None
        return 200, f"Feedback: so long. [RESULT] {len(response[1]) % 5 + 1}"

    server = replay(says)
    settings, folder = settings_for(questions, server.address), tmp_path / "mt_bench"
    found = TASK.run(target, settings, folder)

    records = read_lines(folder / "judgements.jsonl")
    assert len(records) == 2 * 2 * len(QUESTIONS)
    for side in ("base", "adapter"):
        grades = [record["verdict"] for record in records if record["side"] == side]
        pairs = list(zip(grades[::2], grades[1::2], strict=True))
        expected = sum(first + second for first, second in pairs) / len(pairs)  # twice the mean of two grades
        assert found["figures"]["score"][side]["value"] == pytest.approx(expected)
        math = [
            first + second
            for (first, second), question in zip(pairs, QUESTIONS, strict=True)
            if question["category"] == "math"
        ]
        assert found["categories"]["math"][side]["value"] == pytest.approx(sum(math) / 2)
        assert found["answers"][side]["count"] == 10

    for record in records:
        question = next(one for one in QUESTIONS if one["question_id"] == record["question_id"])
        turns, prompt = question["turns"], record["prompt"]
        assert turns[0] in prompt and (turns[1] in prompt) == (record["turn"] == 2)
        if "reference" in question:
            assert f"(Score 5):\n{question['reference'][record['turn'] - 1]}\n" in prompt
        else:
            assert "Reference Answer" not in prompt

    written = {
        side: {one["question_id"]: one["choices"][0]["turns"] for one in read_lines(folder / f"answers_{side}.jsonl")}
        for side in ("base", "adapter")
    }
    assert written["base"] != written["adapter"]
    answers = read_lines(folder / "answers.jsonl")
    temperatures = {"math": 0.0, "writing": 0.7, "humanities": 0.1, "gardening": 0.7}
    for side, by_id in written.items():
        for question in QUESTIONS:
            first, second = question["turns"]
            said = by_id[question["question_id"]]
            (turn_2,) = [
                one
                for one in answers
                if second in one["prompt"]
                and said[0].strip() in one["prompt"]
                and one["by"]["weights"] == target.identity[side]  # type: ignore[index]
            ]
            assert turn_2["prompt"].index(first) < turn_2["prompt"].index(second)
            assert turn_2["text"] == said[1]
            assert turn_2["sampling"]["temperature"] == temperatures[question["category"]]

    asked, before = len(server.bodies), (folder / "answers.jsonl").read_bytes()
    assert TASK.run(target, settings, folder) == found
    assert len(server.bodies) == asked and (folder / "answers.jsonl").read_bytes() == before


def test_a_temperature_in_the_recipe_replaces_the_benchmarks(
    target: Target, tmp_path: Path, questions: Path, replay: Replay
) -> None:
    server = replay(lambda body, number: (200, "[RESULT] 4"))
    settings = settings_for(questions, server.address)
    settings = settings.model_copy(
        update={
            "generation": settings.generation.model_copy(update={"temperature": 0.0, "max_new_tokens": 2}),
            "mt_bench": settings.mt_bench.model_copy(update={"limit": 1}),
        }
    )
    found = TASK.run(target, settings, tmp_path / "mt_bench")
    assert found["questions"] == 1 and found["figures"]["score"]["adapter"]["value"] == 8.0
    assert {one["sampling"]["temperature"] for one in read_lines(tmp_path / "mt_bench" / "answers.jsonl")} == {0.0}


def test_a_real_server_judges_from_end_to_end(
    target: Target, tmp_path: Path, questions: Path, served: str, chat_model: Path
) -> None:
    """`transformers serve` with the tiny model: every verdict is unparsed and counted, and every text is kept."""
    settings = evaluation(
        mt_bench={"questions": str(questions), "limit": 2},
        generation={"max_new_tokens": 4},
        judge={"endpoint": served, "model": str(chat_model), "attempts": 1, "max_new_tokens": 6},
    )
    found = TASK.run(target, settings, tmp_path / "mt_bench")
    assert found["judged"] == {side: {"judgements": 4, "unparsed": 4, "asked_again": 0} for side in ("base", "adapter")}
    assert found["figures"]["unparsed"]["adapter"]["value"] == 1.0
    shown = json.loads(to_json(found))["figures"]["score"]
    assert shown["base"]["value"] is None and shown["verdict"] is None
    (warning,) = warnings("mt_bench", found, "runs/a/evaluation/mt_bench")
    assert warning == (
        "mt_bench: 8 of 8 verdicts of the judge could not be parsed, so its figures say little; "
        "most common reason (8 times): cut off before [RESULT] (evaluation.judge.max_new_tokens=6). "
        "See runs/a/evaluation/mt_bench/judgements.jsonl"
    )
    records = read_lines(tmp_path / "mt_bench" / "judgements.jsonl")
    assert len(records) == 8 and all(record["attempts"][0]["output"] for record in records)
