"""Closeness to references is that of the libraries, also in scripts that their defaults drop."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import BLEU, CHRF

from distft.evaluation.closeness import (
    bleu_counts,
    bleu_of,
    chrf_scores,
    exact_matches,
    figures,
    rouge_scores,
)

ANSWERS = ["The bridge is closed for repairs today.", "A boy found Anna's keys.", "No idea", "the well is dry"] * 3
REFERENCES = [["The bridge is closed for repairs."], ["A boy found the keys.", "Anna's keys were found."], ["x y z"]]
REFERENCES = [*REFERENCES, ["The  well is DRY"]] * 3


def test_exact_match_ignores_spaces_and_case() -> None:
    assert exact_matches(ANSWERS, REFERENCES).tolist() == [0, 0, 0, 1] * 3
    assert exact_matches(["ｆｕｌｌ"], [["other", "Full"]]).tolist() == [1]


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name: str) -> None:
    theirs = RougeScorer([name])
    expected = [
        theirs.score_multi(known, answer)[name].fmeasure for answer, known in zip(ANSWERS, REFERENCES, strict=True)
    ]
    assert rouge_scores(ANSWERS, REFERENCES, name).tolist() == expected


def test_rouge_sees_letters_that_are_not_ascii() -> None:
    assert rouge_scores(["汤很热", "süß"], [["汤很冷"], ["süß"]], "rouge1").tolist() == pytest.approx([2 / 3, 1])
    assert RougeScorer(["rouge1"]).score("汤很热", "汤很热")["rouge1"].fmeasure == 0, (
        "why there is a tokenizer of our own"
    )


def test_chrf_and_bleu_are_those_of_sacrebleu() -> None:
    chrf = [CHRF().sentence_score(answer, known).score for answer, known in zip(ANSWERS, REFERENCES, strict=True)]
    assert chrf_scores(ANSWERS, REFERENCES).tolist() == chrf
    single = [known[0] for known in REFERENCES]
    expected = BLEU().corpus_score(ANSWERS, [single]).score
    assert bleu_of(bleu_counts(ANSWERS, [[one] for one in single], "13a").sum(0)) == pytest.approx(expected)
    chinese = BLEU(tokenize="zh").corpus_score(["汤很热，味道很好。"], [["汤很热，味道不好。"]]).score
    assert bleu_of(bleu_counts(["汤很热，味道很好。"], [["汤很热，味道不好。"]], "zh").sum(0)) == pytest.approx(chinese)


def test_figures_compare_both_sides_with_intervals() -> None:
    names = ["exact_match", "rouge1", "rouge2", "rougeL", "chrf", "bleu"]
    worse = ["nothing at all"] * len(ANSWERS)
    found = figures({"base": worse, "adapter": ANSWERS}, REFERENCES, names, "13a", 1)
    assert list(found) == names
    for name, figure in found.items():
        assert figure["adapter"]["low"] <= figure["adapter"]["value"] <= figure["adapter"]["high"], name
        assert figure["difference"]["value"] == pytest.approx(figure["adapter"]["value"] - figure["base"]["value"])
        assert figure["count"] == len(ANSWERS)
    assert {found[name]["verdict"] for name in ("rouge1", "chrf", "bleu")} == {"gain"}
    alone = figures({"base": worse}, REFERENCES, ["bleu"], "13a", 1)["bleu"]
    assert alone["adapter"] is None and alone["verdict"] is None and np.isfinite(alone["base"]["value"])
