"""Scores of answers against references, each by the library that its field uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sacrebleu
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

_NIST_ORDER = 5  # of the longest n-grams, as the E2E challenge's script has it


@dataclass(frozen=True, slots=True)
class Score:
    """A figure and, where answers are right or wrong one by one, its standard error."""

    value: float
    standard_error: float | None = None


Scores = dict[str, Score]


def accuracy_scores(name: str, right: Sequence[bool]) -> Scores:
    """The share of right ones, in percent."""
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / len(right))
    return {name: Score(100 * share, 100 * error)}


def loss_scores(logprobs: Sequence[Sequence[float]]) -> Scores:
    """The mean loss of given answers' tokens, in nats."""
    losses = [-logprob for answer in logprobs for logprob in answer]
    return {"answer loss": Score(sum(losses) / len(losses))}


def text_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """BLEU, NIST, chrF, ROUGE-L and CIDEr of texts that each have several references.

    BLEU is that of the E2E challenge's own script: lower case, tokens as mteval-v13a has them.
    METEOR's script needs Java; chrF stands in its place.
    """
    most = max(map(len, references))
    # sacrebleu takes one list for every first reference, one for every second, ...
    streams: Any = [
        [given[n] if n < len(given) else None for given in references] for n in range(most)
    ]
    bleu = sacrebleu.corpus_bleu(list(answers), streams, lowercase=True, tokenize="13a")
    chrf = sacrebleu.corpus_chrf(list(answers), streams)
    return {
        "BLEU": Score(bleu.score),
        "NIST": Score(_nist(answers, references)),
        "chrF": Score(chrf.score),
        "ROUGE-L": Score(_rouge_l(answers, references)),
        "CIDEr": Score(_cider(answers, references)),
    }


def _words(text: str) -> list[str]:
    return str(Tokenizer13a()(text.lower())).split()  # type: ignore[no-untyped-call]


def _nist(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    words = [_words(answer) for answer in answers]
    if max(map(len, words)) < _NIST_ORDER:
        return 0.0  # what nltk divides by: there is no n-gram of that order
    expected = [[_words(text) for text in given] for given in references]
    score: float = corpus_nist(expected, words, n=_NIST_ORDER)
    return score


def _rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """In percent; of each answer the best over its references."""
    scorer = RougeScorer(["rougeL"])
    best = [
        scorer.score_multi(list(given), answer)["rougeL"].fmeasure
        for answer, given in zip(answers, references, strict=True)
    ]
    return float(100 * sum(best) / len(best))


def _cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    expected = {n: [" ".join(_words(text)) for text in given] for n, given in enumerate(references)}
    given = {n: [" ".join(_words(answer))] for n, answer in enumerate(answers)}
    score, _ = Cider().compute_score(expected, given)
    return float(score)
