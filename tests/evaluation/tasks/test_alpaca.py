"""Answers compared with a reference's: which one wins, and whether its position decided it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.errors import DataError
from distft.evaluation.judge import Judgement
from distft.evaluation.summary import columns, detail_lines, warnings
from distft.evaluation.target import Target
from distft.evaluation.tasks.alpaca import TASK, Judged, Pair, judged, read_pairs, summarise
from distft.files import read_lines, to_json
from tests.evaluation.conftest import evaluation

Replay = Callable[..., Any]

PAIRS: list[dict[str, str]] = [
    {"instruction": "Name a fruit.", "output": "A pear.", "generator": "someone", "dataset": "kitchen"},
    {
        "instruction": "What does a baker do?",
        "output": "A baker makes bread, early in the morning.",
        "generator": "someone",
        "dataset": "work",
    },
    {
        "instruction": "Say where rivers go.",
        "output": "To the sea, most of them.",
        "generator": "someone",
        "dataset": "land",
    },
    {"instruction": "How many legs has a bee?", "output": "Six.", "generator": "someone", "dataset": "land"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(PAIRS))
    return file


def settings_for(pairs: Path, address: str, **judge: Any) -> Any:
    return evaluation(
        alpaca={"path": str(pairs)},
        generation={"max_new_tokens": 10},
        judge={"endpoint": address, "model": "recorded", "retries": 0, "attempts": 1, **judge},
    )


def test_json_and_json_lines_are_read(pairs: Path, tmp_path: Path) -> None:
    lines = tmp_path / "pairs.jsonl"
    lines.write_text("".join(json.dumps({**pair, "generator": None}) + "\n" for pair in PAIRS))
    assert read_pairs(pairs) == read_pairs(lines)
    assert read_pairs(pairs, 1) == [Pair("Name a fruit.", "A pear.", "kitchen")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no entries"),
        ("[{]", "cannot be read"),
        ('[{"instruction": "One"}]', "entry 1: AlpacaEval's format"),
        (
            '{"instruction": "One", "output": "Two"}\n{"instruction": "One", "output": 2}',
            "entry 2: AlpacaEval's format",
        ),
        ('["One"]', "entry 1"),
    ],
)
def test_a_malformed_file_is_reported_with_the_entry(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(text)
    with pytest.raises(DataError, match=says):
        read_pairs(file)


@pytest.mark.parametrize(
    ("answer", "reference", "outcome", "scores"),
    [
        (5, 3, "win", (10.0, 6.0)),
        (2, 2, "tie", (4.0, 4.0)),
        (1, 4, "loss", (2.0, 8.0)),
        (None, 4, "unparsed", (None, 8.0)),
        (4, None, "unparsed", (8.0, None)),
    ],
)
def test_the_higher_grade_wins(answer: int | None, reference: int | None, outcome: str, scores: Any) -> None:
    assert judged(Judgement(answer, None, 1), Judgement(reference, None, 1)) == Judged(outcome, scores)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer_first", "reference_first", "outcome"),
    [
        ("A", "B", "win"),
        ("B", "A", "loss"),
        ("A", "A", "tie"),
        ("B", "B", "tie"),
        ("A", None, "unparsed"),
        (None, None, "unparsed"),
    ],
)
def test_a_preference_counts_if_both_orders_agree(
    answer_first: str | None, reference_first: str | None, outcome: str
) -> None:
    found = judged(Judgement(answer_first, None, 1), Judgement(reference_first, None, 1))
    assert found.outcome == outcome and (found.places is None) == (outcome == "unparsed")


def test_the_figures_are_what_counting_gives() -> None:
    given = {"base": [2, 4, 3, 3, None, 3], "adapter": [4, 4, 5, 3, 1, 3]}
    found = summarise(
        {side: [Judgement(one, None, 1) for one in values] for side, values in given.items()}, evaluation()
    )  # type: ignore[misc]
    assert found["outcomes"] == {
        "base": {"win": 0, "tie": 1, "loss": 1, "unparsed": 1},
        "adapter": {"win": 1, "tie": 1, "loss": 1, "unparsed": 0},
    }
    figures = found["figures"]
    assert figures["win_rate"]["base"]["value"] == pytest.approx(0.5 / 2)
    assert figures["win_rate"]["adapter"]["value"] == pytest.approx(1.5 / 3)
    assert figures["win_rate"]["difference"]["value"] == pytest.approx((0.5 + 0.5) / 2)
    assert figures["score"]["base"]["value"] == pytest.approx((4 + 6) / 2)
    assert figures["score"]["adapter"]["value"] == pytest.approx((8 + 10 + 2) / 3)
    assert found["reference_score"] == pytest.approx((8 + 6 + 6) / 3)
    assert figures["unparsed"]["base"]["value"] == pytest.approx(1 / 6)
    assert found["position"] == {"base": None, "adapter": None}  # an answer by itself has no place


def by_length(body: dict[str, Any], _: int) -> tuple[int, str]:
    """Prefers the longer response, whatever its position, and grades it higher."""
    prompt = body["messages"][0]["content"]
    # The tiny model writes headings as well, with a space after the marks.
    texts = [one.strip() for one in re.findall(r"###Response[^\n]*:\n(.*?)\n+(?=###\w)", prompt, re.DOTALL)]
    if len(texts) == 1:
        return 200, f"[RESULT] {min(5, 1 + len(texts[0]) // 10)}"
    return 200, f"Feedback: longer. [RESULT] {'A' if len(texts[0]) >= len(texts[1]) else 'B'}"


def test_absolute_grades_decide_and_the_reference_is_graded_once(
    target: Target, tmp_path: Path, pairs: Path, replay: Replay
) -> None:
    server = replay(by_length)
    settings, folder = settings_for(pairs, server.address), tmp_path / "alpaca"
    found = TASK.run(target, settings, folder)
    outputs = {side: json.loads((folder / f"outputs_{side}.json").read_text()) for side in ("base", "adapter")}
    for side, written in outputs.items():
        assert [set(one) for one in written] == [{"instruction", "output", "generator", "dataset"}] * 4
        assert [(one["instruction"], one["dataset"]) for one in written] == [
            (one["instruction"], one["dataset"]) for one in PAIRS
        ]
        assert {one["generator"] for one in written} == {f"tiny ({side})"}
        grades = [
            (min(5, 1 + len(one["output"]) // 10), min(5, 1 + len(pair["output"]) // 10))
            for one, pair in zip(written, PAIRS, strict=True)
        ]
        assert found["outcomes"][side]["win"] == sum(mine > theirs for mine, theirs in grades)
        assert found["outcomes"][side]["loss"] == sum(mine < theirs for mine, theirs in grades)
        assert found["figures"]["score"][side]["value"] == pytest.approx(sum(2 * mine for mine, _ in grades) / 4)
    assert outputs["base"] != outputs["adapter"]
    assert len(server.prompts) == len(set(server.prompts))
    assert sum("\nA pear.\n" in prompt for prompt in server.prompts) == 1
    asked = len(server.bodies)
    assert TASK.run(target, settings, folder) == found and len(server.bodies) == asked


def test_both_orders_are_asked_and_a_fair_judge_is_consistent(
    target: Target, tmp_path: Path, pairs: Path, replay: Replay
) -> None:
    server = replay(by_length)
    found = TASK.run(target, settings_for(pairs, server.address, mode="pairwise"), tmp_path / "alpaca")
    outputs = json.loads((tmp_path / "alpaca" / "outputs_adapter.json").read_text())
    longer = [len(one["output"]) - len(pair["output"]) for one, pair in zip(outputs, PAIRS, strict=True)]
    assert found["outcomes"]["adapter"] == {
        "win": sum(by > 0 for by in longer),
        "tie": sum(by == 0 for by in longer),
        "loss": sum(by < 0 for by in longer),
        "unparsed": 0,
    }
    assert 0 not in longer and found["position"]["adapter"] == {"first_preferred": 0.5, "inconsistent": 0, "pairs": 4}
    records = [one for one in read_lines(tmp_path / "alpaca" / "judgements.jsonl") if one["side"] == "adapter"]
    for output, first, second in zip(outputs, records[::2], records[1::2], strict=True):
        pair = next(one for one in PAIRS if one["instruction"] == output["instruction"])
        assert (first["first"], second["first"]) == ("answer", "reference")
        assert f"###Response A:\n{output['output']}\n\n###Response B:\n{pair['output']}\n" in first["prompt"]
        assert f"###Response A:\n{pair['output']}\n\n###Response B:\n{output['output']}\n" in second["prompt"]
    assert "score" not in found["figures"] and found["reference_score"] is None


def test_a_judge_that_always_prefers_the_first_answer_is_reported(
    target: Target, tmp_path: Path, pairs: Path, replay: Replay
) -> None:
    server = replay(lambda body, number: (200, "Both are good. [RESULT] A"))
    found = TASK.run(target, settings_for(pairs, server.address, mode="pairwise"), tmp_path / "alpaca")
    for side in ("base", "adapter"):
        assert found["outcomes"][side] == {"win": 0, "tie": 4, "loss": 0, "unparsed": 0}
        assert found["position"][side] == {"first_preferred": 1.0, "inconsistent": 4, "pairs": 4}
        won = found["figures"]["preferred_rate"][side]
        assert won["value"] == 0.5 and won["low"] < 0.2 and won["high"] > 0.8, "of four pairs"
    (warning,) = warnings("alpaca", found, "folder")
    assert "two orders disagree in at least half of the pairs" in warning
    assert "base 4 of 4 pairs, first answer preferred in 100% of verdicts" in warning
    (base, adapter) = detail_lines("alpaca", found)
    assert base == (
        "alpaca: outcomes, compared in both orders: base: wins 0, ties 4, losses 0, unparsed 0, "
        "first answer preferred 100.0%, orders disagree 4 of 4 pairs"
    )
    assert adapter.startswith("alpaca: outcomes, compared in both orders: adapter: wins 0")


def test_the_two_modes_are_different_figures_with_different_titles() -> None:
    graded = {side: [Judgement(grade, None, 1) for grade in (3, 2) * 12] for side in ("base", "adapter")}
    preferred = {side: [Judgement(place, None, 1) for place in "AB" * 12] for side in ("base", "adapter")}
    one = summarise(graded, evaluation())  # type: ignore[arg-type]
    other = summarise(preferred, evaluation(judge={"mode": "pairwise"}))  # type: ignore[arg-type]
    assert one["figures"]["win_rate"]["title"] == "AlpacaEval pairs won, graded individually"
    assert other["figures"]["preferred_rate"]["title"] == "AlpacaEval pairs won, compared in both orders"
    assert "preferred_rate" not in one["figures"] and "win_rate" not in other["figures"]
    assert columns({"alpaca": one})["alpaca_win_rate"] == 1.0 == columns({"alpaca": other})["alpaca_preferred_rate"]
    assert columns({"alpaca": one})["alpaca_preferred_rate"] is None is columns({"alpaca": other})["alpaca_win_rate"]
    assert detail_lines("alpaca", one)[0].startswith("alpaca: outcomes, graded individually: base: wins 12, ties 0")
    assert warnings("alpaca", one, "") == warnings("alpaca", other, "") == [], (
        "a judge whose orders agree is no cause for a warning"
    )


def test_a_real_server_judges_from_end_to_end(
    target: Target, tmp_path: Path, pairs: Path, served: str, chat_model: Path
) -> None:
    """`transformers serve` with the tiny model: every verdict is unparsed and counted, and every text is kept."""
    settings = evaluation(
        alpaca={"path": str(pairs), "limit": 1},
        generation={"max_new_tokens": 4},
        judge={"endpoint": served, "model": str(chat_model), "attempts": 2, "max_new_tokens": 6, "mode": "pairwise"},
    )
    found = TASK.run(target, settings, tmp_path / "alpaca")
    assert found["outcomes"]["adapter"] == {"win": 0, "tie": 0, "loss": 0, "unparsed": 1}
    assert found["judged"]["base"] == {"judgements": 2, "unparsed": 2, "asked_again": 2}
    assert json.loads(to_json(found))["figures"]["preferred_rate"]["base"]["value"] is None
    records = read_lines(tmp_path / "alpaca" / "judgements.jsonl")
    assert len(records) == 4 and all(len(record["attempts"]) == 2 for record in records)
