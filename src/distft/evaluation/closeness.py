"""How much of its references an answer has: exact match, ROUGE, chrF and BLEU, by the libraries known for them.

ROUGE (Lin 2004) is rouge-score's F-measure, of the reference that fits best; chrF (Popović 2015) and BLEU (Papineni et
al. 2002) are sacrebleu's. BLEU is that of all answers together; the others are means over answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distft.evaluation.metrics import figure_of, mean_figure, share_figure
from distft.evaluation.target import SideName
from distft.stats import RESAMPLES, Estimate, Floats, bootstrap_weights

Answers = Sequence[str]
References = Sequence[Sequence[str]]
_ORDER = 4
"""Words in the longest n-grams of BLEU."""
_TITLES = {"exact_match": "exact match", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
_WORDS = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_\u2e80-\u9fff\uf900-\ufaff\uac00-\ud7af]+")
"""A word, or a single sign of a script without spaces between words."""


def figures(
    answers: Mapping[SideName, Answers], references: References, metrics: Sequence[str], bleu_tokenize: str, seed: int
) -> dict[str, dict[str, Any]]:
    """The `metrics` as figures."""
    found: dict[str, dict[str, Any]] = {}
    for name in metrics:
        if name == "bleu":
            found[name] = _bleu_figure(answers, references, bleu_tokenize, seed)
        elif name == "chrf":
            chrf = {side: chrf_scores(texts, references) for side, texts in answers.items()}
            found[name] = mean_figure(chrf, title="chrF, mean over answers", form=".2f")
        elif name == "exact_match":
            exact = {side: exact_matches(texts, references) for side, texts in answers.items()}
            found[name] = share_figure(exact, title=_TITLES[name], form=".1%")
        else:
            rouge = {side: rouge_scores(texts, references, name) for side, texts in answers.items()}
            found[name] = mean_figure(rouge, title=_TITLES[name], form=".3f")
    return found


def exact_matches(answers: Answers, references: References) -> Floats:
    """1 where an answer is one of its references, except for spaces, and for case and form of letters; [answers]."""
    return np.array(
        [float(_plain(answer) in map(_plain, known)) for answer, known in zip(answers, references, strict=True)]
    )


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class _Words:
    """rouge-score's own tokenizer drops every letter that is not ASCII; of ASCII texts, this one gives the same."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(unicodedata.normalize("NFKC", text).lower())


def rouge_scores(answers: Answers, references: References, name: str) -> Floats:
    """The F-measure of each answer, [answers], from 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], tokenizer=_Words())
    return np.array(
        [scorer.score_multi(known, answer)[name].fmeasure for answer, known in zip(answers, references, strict=True)]
    )


def chrf_scores(answers: Answers, references: References) -> Floats:
    """sacrebleu's chrF of each answer, [answers], from 0 to 100."""
    from sacrebleu import CHRF

    chrf = CHRF()
    return np.array(
        [chrf.sentence_score(answer, list(known)).score for answer, known in zip(answers, references, strict=True)]
    )


def bleu_counts(answers: Answers, references: References, tokenize: str) -> Floats:
    """What BLEU sums over answers: [answers × 10], n-grams that match and all of them (4 each), length of the answer
    and of the closest reference."""
    from sacrebleu import BLEU

    bleu = BLEU(tokenize=tokenize, effective_order=True)
    found = [bleu.sentence_score(answer, list(known)) for answer, known in zip(answers, references, strict=True)]
    return np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], dtype=np.float64)


def bleu_of(counts: Floats) -> float:
    """sacrebleu's corpus BLEU from sums of `bleu_counts`, from 0 to 100."""
    from sacrebleu import BLEU

    whole = [round(float(number)) for number in counts]
    found = BLEU.compute_bleu(whole[:_ORDER], whole[_ORDER : 2 * _ORDER], whole[-2], whole[-1])
    return float(found.score)


def _bleu_figure(
    answers: Mapping[SideName, Answers], references: References, tokenize: str, seed: int
) -> dict[str, Any]:
    counts = {side: bleu_counts(texts, references, tokenize) for side, texts in answers.items()}
    weights = bootstrap_weights(len(references), seed, _RESAMPLED)
    values = {side: bleu_of(found.sum(0)) for side, found in counts.items()}
    resampled = {side: np.array([bleu_of(row) for row in weights @ found]) for side, found in counts.items()}
    sides = [Estimate.bootstrap(values[side], resampled[side]) for side in values]
    difference = None
    if len(sides) == 2:
        drawn = resampled["adapter"] - resampled["base"]
        difference = Estimate.bootstrap(values["adapter"] - values["base"], drawn)
    other = sides[1] if len(sides) == 2 else None
    return figure_of(sides[0], other, difference, title="BLEU", form=".2f", count=len(references))


_RESAMPLED = RESAMPLES // 10
"""Bootstrap samples of BLEU, which sacrebleu computes one by one; its own default is 1,000 as well."""
