"""How close generated text is to references: BLEU, ROUGE, METEOR, error rates, exact match.

On the host, on sequences of tokens: words, subwords or characters, as the caller splits them. What
is equal is the same token; lower case and punctuation are the caller's as well.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from jaxref.core.checks import check_interval

Tokens = Sequence[Hashable]


def bleu(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, max_order: int = 4
) -> float:
    r"""The BLEU score of a corpus: how many n-grams of its candidates are in their references.

        BLEU = min(1, exp(1 - r/c)) · exp(mean_{n≤N} log p_n)

    with p_n the share of the corpus' n-grams that are in a reference of their sentence, each at
    most as often as there; c the length of all candidates, and r that of their references, of each
    sentence the nearest (the shorter of two).

    Args:
      candidates: for each sentence, its tokens.
      references: for each sentence, one or more references of tokens.
      max_order: N at least 1. Default 4.

    Returns:
      BLEU from 0 to 1; 0 where an order has no n-gram in common.

    Raises:
      ValueError: numbers of sentences that differ, none, a sentence without reference, or
        `max_order` below 1.

    Use it on a corpus, for which it is made; of one sentence it is mostly 0. `rouge` asks what of
    the reference is found.

    Cost: O(N) n-grams counted for each token of candidates and references, in Python.

    Example:
      >>> candidate, reference = "the cat sat on a mat".split(), "the cat sat on the mat".split()
      >>> print(round(bleu([candidate], [[reference]]), 3))
      0.537

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(1, np.inf, max_order=max_order)
    _check_corpus(candidates, references)
    matches, totals = np.zeros(max_order), np.zeros(max_order)
    length = reference_length = 0
    for candidate, alternatives in zip(candidates, references):
        if not len(alternatives):
            raise ValueError("references must hold at least one reference for every sentence")
        length += len(candidate)
        reference_length += min(
            (abs(len(reference) - len(candidate)), len(reference)) for reference in alternatives
        )[1]
        for n in range(1, max_order + 1):
            counts = _ngrams(candidate, n)
            most: Counter = Counter()
            for reference in alternatives:
                most |= _ngrams(reference, n)
            matches[n - 1] += (counts & most).total()
            totals[n - 1] += counts.total()
    if not matches.all():
        return 0.0
    brevity = min(0.0, 1 - reference_length / length)
    return float(np.exp(brevity + np.mean(np.log(matches / totals))))


def rouge(candidate: Tokens, reference: Tokens, *, order: int | None = None) -> float:
    r"""The ROUGE score of a summary: what its reference and it have in common (F1).

        F1 = 2 · common / (size of candidate + size of reference)

    ROUGE-N counts the n-grams that both have, ROUGE-L the longest common subsequence of tokens.

    Args:
      candidate: the tokens of the summary.
      reference: those of the reference.
      order: n at least 1, for ROUGE-N. Default: ROUGE-L.

    Returns:
      F1 from 0 to 1; 0 where one of them is empty.

    Raises:
      ValueError: an `order` below 1.

    Use it for summaries, as the mean over texts; `bleu` is for translations. Between a
    passage of the training text and what a model makes of its start, ROUGE-L says how much the
    model has learned by heart.

    Cost: for ROUGE-L O(candidate · reference) steps in Python, for ROUGE-N one count of the n-grams
    of each.

    Example:
      >>> texts = "the cat sat on a mat".split(), "the cat is on the mat".split()
      >>> print(round(rouge(*texts), 3), round(rouge(*texts, order=2), 3))
      0.667 0.2

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; of recitals: Hans et al., "Be
    like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs", 2024,
    arXiv:2406.10209.
    """
    if order is None:
        common, sizes = _common_subsequence(candidate, reference), len(candidate) + len(reference)
    else:
        check_interval(1, np.inf, order=order)
        a, b = _ngrams(candidate, order), _ngrams(reference, order)
        common, sizes = (a & b).total(), a.total() + b.total()
    return 2 * common / sizes if common else 0.0


def meteor(
    candidate: Tokens,
    reference: Tokens,
    *,
    alpha: float = 0.9,
    beta: float = 3.0,
    gamma: float = 0.5,
) -> float:
    r"""The METEOR score of a sentence, on equal tokens: what is found, and in how many pieces.

        METEOR = (1 - γ (chunks / m)^β) · P R / (α P + (1 - α) R)

    with m tokens of the candidate aligned with equal ones of the reference, of which P is the share
    of the candidate's tokens and R that of the reference's; a chunk is a run that is aligned with a
    run. Of the alignments of most tokens, one with few chunks is built from the longest runs down.

    Args:
      candidate: the tokens of the sentence.
      reference: those of the reference.
      alpha: α in [0, 1], how much recall counts against precision. Default 0.9.
      beta: β at least 0. Default 3.
      gamma: γ in [0, 1], the largest penalty. Default 0.5.

    Returns:
      The score from 0 to 1; 0 where no token is aligned.

    Raises:
      ValueError: a hyperparameter out of its range.

    Use it for single sentences, where `bleu` fails. Stems and synonyms, the further stages of the
    original, are equal when the caller replaces them by one token.

    Cost: in Python, a search of all pairs of tokens for each chunk: O(chunks · candidate ·
    reference), more for long runs.

    Example:
      >>> texts = "on the mat sat the cat".split(), "the cat sat on the mat".split()
      >>> print(round(meteor(*texts), 3))
      0.938

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    check_interval(0, 1, alpha=alpha, gamma=gamma)
    check_interval(0, np.inf, beta=beta)
    matched, chunks = _align(list(candidate), list(reference))
    if not matched:
        return 0.0
    precision, recall = matched / len(candidate), matched / len(reference)
    mean = precision * recall / (alpha * precision + (1 - alpha) * recall)
    return mean * (1 - gamma * (chunks / matched) ** beta)


def token_error_rate(candidates: Sequence[Tokens], references: Sequence[Tokens]) -> float:
    r"""The edits that turn candidates into their references, over the length of these (WER, CER).

        (substitutions + deletions + insertions) / (tokens of the references)

    Args:
      candidates: for each text its tokens: words for the word error rate, characters for the
        character error rate.
      references: for each text, the tokens of its reference.

    Returns:
      The rate over all texts, at least 0, and above 1 where more is edited than there was; ∞ where
      all references are empty and a candidate is not, 0 where all are empty.

    Raises:
      ValueError: numbers of texts that differ, or none.

    Use it for speech and handwriting, where the order of what is said is fixed.

    Cost: O(candidate · reference) steps in Python for each text, with one row of them in memory.

    Example:
      >>> words, letters = ["a cat sat".split()], ["a bat".split()]
      >>> print(token_error_rate(letters, words), token_error_rate(["bat"], ["cat"]))
      0.6667 0.3333

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694.
    """
    _check_corpus(candidates, references)
    edits = sum(_edit_distance(a, b) for a, b in zip(candidates, references))
    length = sum(map(len, references))
    return edits / length if length else (math.inf if edits else 0.0)


def exact_match(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    r"""The share of texts that are equal to one of their references.

        mean_i 1[candidate_i ∈ references_i]

    Args:
      candidates: the texts.
      references: for each text, those that are right.

    Returns:
      The share, from 0 to 1.

    Raises:
      ValueError: numbers of texts that differ, or none.

    Use it for short answers, and for passages that a model recites; `token_error_rate` says how far
    the others are off.

    Cost: one comparison for each reference.

    Example:
      >>> exact_match(["four", "five"], [["4", "four"], ["six"]])
      0.5

    Reference: Terven, Cordova-Esparza, Ramirez-Pedraza, Chavez-Urbiola, Romero-Gonzalez, "Loss
    Functions and Metrics in Deep Learning", 2023, arXiv:2307.02694; of recitals: Hans et al., "Be
    like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs", 2024,
    arXiv:2406.10209.
    """
    _check_corpus(candidates, references)
    return sum(a in b for a, b in zip(candidates, references)) / len(candidates)


def _check_corpus(candidates: Sequence, references: Sequence) -> None:
    if not len(candidates) or len(candidates) != len(references):
        raise ValueError(
            "candidates and references must be as many, and at least one, "
            f"got {len(candidates)} and {len(references)}"
        )


def _ngrams(tokens: Tokens, n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def _edit_distance(a: Tokens, b: Tokens) -> int:
    """The least number of substitutions, deletions and insertions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b):
            row.append(min(above[j] + (x != y), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def _align(a: list, b: list) -> tuple[int, int]:
    """How many tokens can be aligned with equal ones, and in how many runs, longest runs first."""
    free_a, free_b = [True] * len(a), [True] * len(b)
    matched = chunks = 0
    while True:
        longest, start_a, start_b = 0, 0, 0
        for i in range(len(a)):
            for j in range(len(b)):
                n = 0
                while (
                    i + n < len(a)
                    and j + n < len(b)
                    and free_a[i + n]
                    and free_b[j + n]
                    and a[i + n] == b[j + n]
                ):
                    n += 1
                if n > longest:
                    longest, start_a, start_b = n, i, j
        if not longest:
            return matched, chunks
        for n in range(longest):
            free_a[start_a + n] = free_b[start_b + n] = False
        matched, chunks = matched + longest, chunks + 1
