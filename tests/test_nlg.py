"""BLEU, ROUGE, METEOR and CIDEr against sacrebleu, nltk, rouge-score, hand-worked numbers and the formula."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import BLEU

from surgvqa import nlg

WORDS = ["a", "polyp", "in", "the", "colon"]


def sentences(
    seed: int, count: int, references: int = 1, least: int = 1
) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def one() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, 12)))

    return [one() for _ in range(count)], [
        [one() for _ in range(rng.randint(1, references))] for _ in range(count)
    ]


def of(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    values = nlg.formula(nlg.statistics(answers, references).sum(0))
    return dict(zip(nlg.NAMES, values.tolist(), strict=True))


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_is_that_of_sacrebleu_and_of_nltk(order: int, references: int) -> None:
    answers, expected = sentences(order, 200, references)
    ours = of(answers, expected)[f"bleu{order}"]
    most = max(map(len, expected))
    streams = [[own[number] if number < len(own) else None for own in expected] for number in range(most)]
    theirs = BLEU(smooth_method="none", max_ngram_order=order).corpus_score(answers, streams)
    assert ours == pytest.approx(theirs.score / 100)
    assert 0 < ours < 1
    answers, expected = sentences(order, 200, references, least=order)
    assert of(answers, expected)[f"bleu{order}"] == pytest.approx(nltk_bleu(answers, expected, order))


def nltk_bleu(answers: list[str], references: list[list[str]], order: int) -> float:
    words = [[reference.split() for reference in own] for own in references]
    return float(corpus_bleu(words, [answer.split() for answer in answers], [1 / order] * order))


def test_nltk_counts_an_n_gram_in_answers_that_have_none() -> None:
    answers = ["a polyp in the", "polyp", "colon", "left"]
    references = [[answer] for answer in answers]
    assert of(answers, references)["bleu4"] == 1
    # 4-grams: 1 of max(1, 1) + 3 · max(1, 0); 3-grams: 2 of 2 + 3; 2-grams: 3 of 3 + 3.
    assert nltk_bleu(answers, references, 4) == pytest.approx((1 / 4 * 2 / 5 * 3 / 6) ** (1 / 4))


def test_weights_of_a_third_that_are_033_give_another_bleu3() -> None:
    """Code of papers passes (0.33, 0.33, 0.33): the brevity penalty times the 0.99th power of the rest."""
    answers, expected = sentences(5, 100, least=3)
    words = [[reference.split() for reference in own] for own in expected]
    theirs = corpus_bleu(words, [answer.split() for answer in answers], (0.33, 0.33, 0.33, 0))
    lengths = nlg.statistics(answers, expected).sum(0)[:2]
    brevity = min(1, math.exp(1 - lengths[1] / lengths[0]))
    ours = of(answers, expected)["bleu3"]
    assert theirs == pytest.approx(brevity * (ours / brevity) ** 0.99)
    assert theirs != pytest.approx(ours)


def test_bleu_by_hand() -> None:
    # 1-grams 4 of 5, 2-grams 2 of 4, no 3-gram; 5 words against 6: exp(1 - 6/5).
    found = of(["a polyp in the left"], [["a polyp is in the colon"]])
    brevity = math.exp(-1 / 5)
    assert found["bleu1"] == pytest.approx(brevity * 4 / 5)
    assert found["bleu2"] == pytest.approx(brevity * math.sqrt(4 / 5 * 2 / 4))
    assert found["bleu3"] == found["bleu4"] == 0.0


@pytest.mark.parametrize("answers", [[""], ["left"], ["", "left"]])
def test_empty_and_short_answers_are_scored(answers: list[str]) -> None:
    found = of(answers, [["the polyp is seen"] for _ in answers])
    assert set(found.values()) == {0.0}
    assert of(["seen"], [[""]])["bleu1"] == 0.0


def test_rouge_is_that_of_rouge_score() -> None:
    answers, expected = sentences(7, 100, 3)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = of(answers, expected)
    for name in ("rouge1", "rouge2", "rougeL"):
        each = [
            max(scorer.score(reference, answer)[name].fmeasure for reference in own)
            for answer, own in zip(answers, expected, strict=True)
        ]
        assert found[name] == pytest.approx(np.mean(each))
    # 3 of 4 words and 3 of 5: F = 2 · 3/4 · 3/5 / (3/4 + 3/5) = 2/3; in that order 2 of them: 4/9.
    one = of(["the colon left polyp"], [["a polyp in the colon"]])
    assert one["rouge1"] == pytest.approx(2 / 3)
    assert one["rougeL"] == pytest.approx(4 / 9)


def test_meteor_matches_words_and_stems_but_no_synonyms() -> None:
    # All 3 match ("polyps" by its stem) in 1 chunk: F = 1, penalty 0.5 · (1/3)³.
    assert of(["the polyps left"], [["the polyp left"]])["meteor_stem"] == pytest.approx(1 - 0.5 / 27)
    # 2 of 3 match in 2 chunks: F = 2/3, penalty 0.5 · (2/2)³.
    assert of(["the small polyp"], [["the little polyp"]])["meteor_stem"] == pytest.approx(1 / 3)
    # P = 1/2, R = 1: F = P R / (0.9 P + 0.1 R) = 10/11, penalty 0.5.
    assert of(["polyp seen"], [["Polyp"]])["meteor_stem"] == pytest.approx(10 / 11 / 2)
    assert of(["colon"], [["polyp", "colon"]])["meteor_stem"] == pytest.approx(0.5)


def test_meteor_aligns_from_the_end_where_a_word_comes_twice() -> None:
    """nltk's way: "a" at the end is matched, which makes 2 chunks of 2 words, where 1 is possible."""
    mean = (2 / 3) / (0.9 * 2 / 3 + 0.1)  # P = 2/3, R = 1
    assert of(["a polyp a"], [["a polyp"]])["meteor_stem"] == pytest.approx(mean * (1 - 0.5 * (2 / 2) ** 3))
    assert of(["a polyp in"], [["a polyp"]])["meteor_stem"] == pytest.approx(mean * (1 - 0.5 * (1 / 2) ** 3))


def test_cider_by_hand() -> None:
    """Two questions, so an n-gram of one of them weighs log 2; 3- and 4-grams are not there and give 0."""
    references = [[["a", "b"]], [["c", "d"]]]
    found = nlg.cider([["a", "b"], ["c", "x"]], references)
    # 1-grams and 2-grams are equal: (1 + 1 + 0 + 0) / 4 · 10; one of two 1-grams: (1/2 + 0 + 0 + 0) / 4 · 10.
    assert found == pytest.approx([5, 1.25])
    # Counts (2, 2) clipped to (1, 1) over norms √8 · √2: 1/2; 2-grams (ab 2, ba 1): 1 / √5; 3 2-grams for 1.
    longer = nlg.cider([["a", "b", "a", "b"], ["c", "d"]], references)
    assert longer[0] == pytest.approx(10 / 4 * (1 / 2 + 1 / math.sqrt(5)) * math.exp(-(2**2) / 72))
    # One question alone: every idf is log 1 = 0.
    assert nlg.cider([["a", "b"]], [[["a", "b"]]]) == [0]


def slow_cider(answers: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """The formula with vectors over all n-grams that there are, one n at a time."""

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(zip(*(words[start:] for start in range(n)), strict=False))

    scores = []
    for answer, own in zip(answers, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            holding = [set().union(*(grams(words, n) for words in question)) for question in references]
            every = sorted(set().union(*holding, grams(answer, n)))
            idf = np.array(
                [math.log(len(answers) / max(1, sum(gram in held for held in holding))) for gram in every]
            )
            for reference in own:
                one = np.array([grams(answer, n)[gram] for gram in every]) * idf
                other = np.array([grams(reference, n)[gram] for gram in every]) * idf
                norm = np.linalg.norm(one) * np.linalg.norm(other)
                apart = sum(grams(answer, 2).values()) - sum(grams(reference, 2).values())
                if norm:
                    total += (np.minimum(one, other) @ other) / norm * math.exp(-(apart**2) / 72) / len(own)
        scores.append(total * 10 / 4)
    return scores


def test_cider_is_the_formula() -> None:
    for seed in range(5):
        answers, expected = sentences(seed, 12, 3)
        words, others = [a.split() for a in answers], [[r.split() for r in own] for own in expected]
        assert nlg.cider(words, others) == pytest.approx(slow_cider(words, others))


def test_cider_counts_every_question_as_a_document() -> None:
    """Equal questions are looked at once, and counted as often as they are there."""
    answers, expected = sentences(3, 6)
    twice = nlg.statistics(answers * 2, expected * 2)[:, -2]
    words = [answer.split() for answer in answers * 2], [[r.split() for r in own] for own in expected * 2]
    assert twice == pytest.approx(slow_cider(*words))
    assert nlg.statistics(["left"] * 3, [["left"], ["left"], ["colon"]])[:, -2] == pytest.approx(
        [10 / 4, 10 / 4, 0]
    )


def test_cider_looks_at_words_in_lower_case_without_their_punctuation() -> None:
    found = nlg.statistics(["Polyp, seen.", "Left."], [["polyp , seen ."], ["left"]])[:, -2]
    assert found[0] == pytest.approx(10)
    assert 0 < found[1] < 10 / 4
