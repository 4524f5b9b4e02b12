"""What a report says about evaluations: the answer about one run, details and warnings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distft.reports.markdown import markdown
from distft.reports.report import report

from .conftest import make


def an_evaluation(**verdicts: str) -> dict[str, Any]:
    """The evaluation of two tasks, with these verdicts on the accuracy and on the pairs won, as in a summary."""
    side = {"value": 0.5, "low": 0.4, "high": 0.6}

    def figure(title: str, verdict: str) -> dict[str, Any]:
        return {
            "title": title,
            "form": ".2f",
            "count": 40,
            "base": side,
            "adapter": {**side, "value": 0.75},
            "difference": side,
            "verdict": verdict,
        }

    counts = {"judgements": 8, "unparsed": 5, "asked_again": 0}
    return {
        "imdb": {
            "figures": {"accuracy": figure("accuracy", verdicts["imdb"]), "f1": figure("F1", "gain")},
            "confusion": {
                "rows": ["bad", "good"],
                "columns": ["bad", "good", "unparsed"],
                "logprob": {"base": [[7, 3, 0], [4, 6, 0]]},
                "generation": {"base": [[0, 1, 9], [2, 3, 5]]},
            },
            "unparsed": {
                "base": {"count": 14, "first": ["no | idea", "no | idea", "hm"]},
                "adapter": {"count": 0, "first": []},
            },
        },
        "alpaca": {
            "figures": {"preferred_rate": figure("pairs won", verdicts["alpaca"])},
            "outcomes": {side: {"win": 1, "tie": 2, "loss": 1, "unparsed": 4} for side in ("base", "adapter")},
            "position": {
                "base": {"first_preferred": 0.75, "inconsistent": 2, "pairs": 4},
                "adapter": {"first_preferred": 0.5, "inconsistent": 1, "pairs": 4},
            },
            "judge": {"model": "j", "mode": "pairwise", "max_new_tokens": 18},
            "judged": {"base": {**counts, "unparsed": 4}, "adapter": counts},
            "reasons": {"cut off before [RESULT]": 6, "no [RESULT]": 3},
        },
    }


def test_the_answer_about_one_run_is_what_its_fine_tune_changed(tmp_path: Path) -> None:
    measured = report([make(tmp_path, "measured")]).verdict
    assert measured.startswith(
        "Held-out perplexity 54.60 before training and 7.39 after, without a confidence interval"
    )
    assert report([make(tmp_path, "bare", eval_before=None)]).verdict == ""
    failed = report([make(tmp_path, "bad", status="failed", cause="OutOfMemory: no")]).verdict
    assert failed == "bad has no finished run (out of memory)."

    alone = {
        "title": "accuracy",
        "form": ".2f",
        "count": 40,
        "base": {"value": 0.5},
        "adapter": None,
        "difference": None,
        "verdict": None,
    }
    untrained = make(tmp_path, "alone", status="evaluated", evaluation={"imdb": {"figures": {"accuracy": alone}}})
    assert report([untrained]).verdict.startswith("Only the base model was evaluated")

    found = an_evaluation(imdb="gain", alpaca="too few items")
    fair = {
        task: {key: value for key, value in of.items() if key not in ("position", "judged")}
        for task, of in found.items()
    }
    headline = "The fine-tune changed imdb accuracy 0.50 → 0.75 (gain). Too few items for pairs won."
    made = report([make(tmp_path, "changed", evaluation=fair)])
    assert made.verdict == headline and f"**{headline}**" in markdown(made)
    assert json.loads(made.to_json())["verdict"] == headline and made.warnings == []
    doubted = report([make(tmp_path, "doubted", evaluation=found)]).verdict
    assert (
        doubted
        == "The fine-tune changed imdb accuracy 0.50 → 0.75 (gain). The judge's verdicts are unreliable for alpaca."
    )
    fair["imdb"]["figures"]["accuracy"]["verdict"] = "inconclusive"
    same = report([make(tmp_path, "same", evaluation=fair)]).verdict
    assert same == ("No change could be shown: inconclusive for imdb accuracy; too few items for pairs won.")
    two = report([make(tmp_path, "one", "lora.r=1"), make(tmp_path, "two", "lora.r=2", evaluation=found)]).verdict
    assert two.startswith("two is as fast as one"), "the headline of several variants is how they compare"


def test_a_report_shows_the_details_of_an_evaluation_and_warns(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", evaluation=an_evaluation(imdb="gain", alpaca="gain"))
    text = markdown(report([folder]))
    assert "| task   |" in text, "one run needs no column of names"
    rows = {
        tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert {
        ("base", "bad", "7", "3"),
        ("side", "class", "predicted bad", "predicted good", "no label word"),
        ("base", "good", "2", "3", "5"),
        ("base", "14", '"no \\| idea" · "hm"'),
        ("side", "wins", "ties", "losses", "unparsed", "first answer preferred", "orders disagree"),
        ("base", "1", "2", "1", "4", "75.0%", "2 of 4 pairs"),
        ("adapter", "1", "2", "1", "4", "50.0%", "1 of 4 pairs"),
    } <= rows
    assert "### alpaca: outcomes, compared in both orders" in text
    unread, biased = (line for line in text.splitlines() if line.startswith("- Warning: "))
    assert unread == (
        "- Warning: alpaca: 9 of 16 verdicts of the judge could not be parsed, so its figures say little; most "
        f"common reason (6 times): cut off before [RESULT] (evaluation.judge.max_new_tokens=18). "
        f"See {folder.path}/evaluation/alpaca/judgements.jsonl."
    )
    assert "orders disagree in at least half of the pairs" in biased
    assert "(base 2 of 4 pairs, first answer preferred in 75% of verdicts)" in biased, (
        "the adapter's 1 of 4 is below half"
    )
    several = markdown(report([folder, make(tmp_path, "b", evaluation=an_evaluation(imdb="loss", alpaca="loss"))]))
    table = several.split("### imdb: confusion matrix by likelihood\n\n")[1].split("\n\n")[0].splitlines()
    first = [[cell.strip() for cell in line.split("|")[1:4]] for line in (table[0], *table[2:])]
    assert first == [["run", "side", "class"], *([run, "base", word] for run in "ab" for word in ("bad", "good"))]
