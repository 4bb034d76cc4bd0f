"""BLEU, ROUGE, METEOR and CIDEr of written answers, as sums over questions. Needs no network and no Java.

docs/metrics.md tells how each relates to what papers use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from surgvqa.intervals import Array

NAMES = (
    "bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougeL", "meteor_stem", "cider",
)  # fmt: skip
"""What `formula` computes, in order."""

Gram: TypeAlias = tuple[str, ...]
Grams: TypeAlias = Counter[Gram]

_ORDERS = 4
_SIGMA = 6.0


def statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Array:
    """(questions, 16): what `formula` takes, summed over any of the questions.

    Lengths of answer and reference, matching 1- to 4-grams, all 1- to 4-grams, then ROUGE-1, -2, -L, METEOR,
    CIDEr and 1 for each question. CIDEr weighs n-grams by how many of these questions' references hold them.
    """
    questions = [(answer, tuple(own) or ("",)) for answer, own in zip(answers, references, strict=True)]
    distinct = {question: number for number, question in enumerate(dict.fromkeys(questions))}
    number = np.array([distinct[question] for question in questions], dtype=np.intp)
    times = np.bincount(number, minlength=len(distinct))
    scored = np.column_stack(
        [
            [_bleu_counts(*question) for question in distinct] or np.zeros((0, 2 + 2 * _ORDERS)),
            [_rouge(*question) for question in distinct] or np.zeros((0, 3)),
            [_meteor_stem(*question) for question in distinct] or np.zeros(0),
            cider(
                [_tokens(answer) for answer, _ in distinct],
                [[_tokens(reference) for reference in own] for _, own in distinct],
                times.tolist(),
            ),
            np.ones(len(distinct)),
        ]
    )
    return np.asarray(scored[number], dtype=np.float64)


def formula(sums: Array) -> Array:
    """(..., 16) sums of `statistics` to (..., 9) scores, as in `NAMES`; NaN without questions.

    BLEU-n is that of Papineni et al. (ACL 2002) over all questions together, without smoothing: 0 where no
    n-gram of a length matches. The others are means over questions.
    """
    length, reference = sums[..., 0], sums[..., 1]
    matching, all_grams = sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS : 2 + 2 * _ORDERS]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(matching > 0, np.log(matching / all_grams), -np.inf)
        brevity = np.minimum(0, 1 - reference / length)
        bleu = np.exp(np.cumsum(logs, -1) / np.arange(1, 1 + _ORDERS) + brevity[..., None])
        bleu = np.where(length[..., None] > 0, bleu, 0.0)
        means = sums[..., 2 + 2 * _ORDERS : -1] / sums[..., -1:]
    return np.where(sums[..., -1:] > 0, np.concatenate([bleu, means], -1), np.nan)


def cider(
    answers: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    times: Sequence[int] | None = None,
) -> Array:
    """CIDEr-D of each question, 0 to 10, from words; `times` is how often each question is there.

    Vedantam, Lawrence Zitnick & Parikh, "CIDEr: Consensus-based Image Description Evaluation" (CVPR 2015),
    section "CIDEr-D", as coco-caption computes it: for n = 1 to 4 the cosine of tf-idf vectors with the
    answer's counts clipped to the reference's, times exp(-(difference in length)² / (2 · 6²)), the mean over
    n and references, times 10. idf is log(questions / questions with the n-gram in a reference), and length
    is counted in 2-grams, as there. With one question every idf and so every score is 0.
    """
    times = times or [1] * len(answers)
    grams = [[_grams(words) for words in own] for own in references]
    frequency: Grams = Counter()
    for own, number in zip(grams, times, strict=True):
        for gram in set().union(*own):
            frequency[gram] += number
    documents = math.log(max(1, sum(times)))
    weight = {gram: documents - math.log(count) for gram, count in frequency.items()}

    def vectors(
        counts: Grams,
    ) -> tuple[list[dict[Gram, float]], list[float], int]:
        parts: list[dict[Gram, float]] = [{} for _ in range(_ORDERS)]
        for gram, count in counts.items():
            parts[len(gram) - 1][gram] = count * weight.get(gram, documents)
        norms = [math.sqrt(sum(value * value for value in part.values())) for part in parts]
        return parts, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = np.zeros(len(answers))
    for row, (answer, own) in enumerate(zip(answers, grams, strict=True)):
        parts, norms, length = vectors(_grams(answer))
        for counts in own:
            others, other_norms, other_length = vectors(counts)
            cosines = 0.0
            for part, other, norm, other_norm in zip(parts, others, norms, other_norms, strict=True):
                if norm and other_norm:
                    both = part.keys() & other.keys()
                    product = sum(min(part[gram], other[gram]) * other[gram] for gram in both)
                    cosines += product / (norm * other_norm)
            penalty = math.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
            scores[row] += 10 * penalty * cosines / _ORDERS / len(own)
    return scores


def _grams(words: Sequence[str]) -> Grams:
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, 1 + _ORDERS)
        for start in range(len(words) - size + 1)
    )


def _tokens(text: str) -> list[str]:
    """In lower case, split as mteval-v13a does."""
    return str(_bleu().tokenizer(text.lower())).split()


def _bleu_counts(answer: str, references: Sequence[str]) -> list[int]:
    score = _bleu().corpus_score([answer], [[reference] for reference in references])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _rouge(answer: str, references: Sequence[str]) -> list[float]:
    scores = _rouge_scorer().score_multi(references, answer)
    return [scores[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]


def _meteor_stem(answer: str, references: Sequence[str]) -> float:
    from nltk.translate.meteor_score import meteor_score

    words = [_tokens(reference) for reference in references]
    return float(meteor_score(words, _tokens(answer), stemmer=_stemmer(), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """In place of WordNet, which nltk would download: no word has a synonym."""

    def synsets(self, word: str) -> list[object]:
        return []


@cache
def _bleu() -> Any:
    from sacrebleu import BLEU

    return BLEU(smooth_method="none", tokenize="13a")


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"])


@cache
def _stemmer() -> Any:
    """nltk's Porter stemmer, which looks at a word once."""
    from nltk.stem.porter import PorterStemmer

    class Remembering(PorterStemmer):  # type: ignore[misc]  # nltk ships no types
        stem = cache(PorterStemmer.stem)

    return Remembering()
