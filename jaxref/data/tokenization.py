"""Words cut into sub-words by maximum likelihood, and the vocabulary that does it well."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from jaxref.core.checks import check_interval


class Segmentation(NamedTuple):
    """A word in tokens.

    Attributes:
      tokens: that make up the word.
      log_probability: the sum of theirs.
    """

    tokens: tuple[str, ...]
    log_probability: float


def maximum_likelihood_segmentation(
    word: str, log_probabilities: Mapping[str, float]
) -> Segmentation:
    r"""The most probable way to write a word in tokens, which are drawn independently.

        argmax Σ_i log p(t_i)   over all t_1 t_2 ... t_k = word

    by dynamic programming (Viterbi). Of equally probable ones, it takes the one whose last token is
    longest.

    Args:
      word: the word; the empty one has no tokens.
      log_probabilities: log p by token; tokens of -inf are never used.

    Returns:
      The `Segmentation`.

    Raises:
      ValueError: the word cannot be written in these tokens, or there is an empty token.

    Use it with the vocabulary of `build_subword_vocabulary`, or of another unigram model.

    Cost: `len(word)` times the length of the longest token look-ups, in Python.

    Example:
      >>> log_p = {"a": -2.0, "b": -2.0, "ab": -3.0, "ba": -3.5}
      >>> maximum_likelihood_segmentation("abab", log_p)
      Segmentation(tokens=('ab', 'ab'), log_probability=-6.0)

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441; the unigram model after Kudo, "Subword
    Regularization", 2018, arXiv:1804.10959.
    """
    if "" in log_probabilities:
        raise ValueError("log_probabilities must not have an empty token")
    longest = max(map(len, log_probabilities), default=0)
    best, start = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for begin in range(max(0, end - longest), end):
            total = best[begin] + log_probabilities.get(word[begin:end], -math.inf)
            if total > best[end]:
                best[end], start[end] = total, begin
    if best[-1] == -math.inf:
        raise ValueError(f"word {word!r} cannot be written in these tokens")
    tokens: list[str] = []
    end = len(word)
    while end > 0:
        tokens.append(word[start[end] : end])
        end = start[end]
    return Segmentation(tuple(reversed(tokens)), best[-1])


def build_subword_vocabulary(
    word_counts: Mapping[str, int], vocabulary_size: int, max_length: int = 8
) -> dict[str, float]:
    r"""Grows a vocabulary by the token that raises the likelihood of the corpus most.

    With n_t uses of token t in the most probable segmentations, and N of all, the likelihood at its
    best probabilities p(t) = n_t / N is

        L = Σ_w count(w) max_segmentation Σ_i log p(t_i) = Σ_t n_t log n_t - N log N

    It starts from the characters. Every run of tokens that stand next to each other is a candidate
    c; used in all of its places, which takes the n_t of its parts down and N too, it changes L by a
    gain that the same formula gives. The best one is added, the words are segmented again, and p is
    estimated again: L rises with each of these steps. It ends at the size, or without a gain.

    Args:
      word_counts: how often each word occurs, at least 0.
      vocabulary_size: tokens to end with, at least the number of different characters.
      max_length: characters of a token at most, at least 1. Default 8.

    Returns:
      log p by token, in the order in which they came. A character that only occurs inside of longer
      tokens keeps 1 / N, that of a single use, so that other words can be written.

    Raises:
      ValueError: no word, a negative count, or a size below the number of characters.

    Use it on a table of words of moderate size, once; `maximum_likelihood_segmentation` then writes
    any text of these characters.

    Cost: for each new token a pass over all words with up to `max_length` runs at each of their
    tokens, and their segmentations anew, in Python.

    Example:
      >>> vocabulary = build_subword_vocabulary({"low": 5, "lower": 2, "newer": 6}, 8)
      >>> list(vocabulary)[6:]
      ['newer', 'low']

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    counts = {word: count for word, count in word_counts.items() if word and count}
    if not counts or min(counts.values()) < 0:
        raise ValueError(f"word_counts must count at least one word, got {dict(word_counts)}")
    check_interval(1, math.inf, max_length=max_length)
    vocabulary = dict.fromkeys(character for word in counts for character in word)
    check_interval(len(vocabulary), math.inf, vocabulary_size=vocabulary_size)
    segmented = {word: tuple(word) for word in counts}
    while True:
        used = _uses(segmented, counts)
        candidate = None
        if len(vocabulary) < vocabulary_size:
            candidate = _best_candidate(segmented, counts, used, max_length)
        if candidate is None:
            break
        vocabulary[candidate] = None
        segmented = {word: _joined(tokens, candidate) for word, tokens in segmented.items()}
        log_p = _log_probabilities(_uses(segmented, counts))
        for word in segmented:
            segmented[word] = maximum_likelihood_segmentation(word, log_p).tokens
    total = sum(used.values())
    return {token: math.log(max(used[token], 1) / total) for token in vocabulary}


def _uses(segmented: Mapping[str, tuple[str, ...]], counts: Mapping[str, int]) -> Counter[str]:
    used: Counter[str] = Counter()
    for word, tokens in segmented.items():
        for token in tokens:
            used[token] += counts[word]
    return used


def _log_probabilities(used: Counter[str]) -> dict[str, float]:
    total = sum(used.values())
    return {token: math.log(count / total) for token, count in used.items()}


def _joined(tokens: tuple[str, ...], candidate: str) -> tuple[str, ...]:
    """The tokens with every run that spells the candidate in one, from the left."""
    joined: list[str] = []
    at = 0
    while at < len(tokens):
        end, spelled = at, ""
        while end < len(tokens) and len(spelled) < len(candidate):
            spelled += tokens[end]
            end += 1
        if spelled == candidate:
            joined.append(candidate)
            at = end
        else:
            joined.append(tokens[at])
            at += 1
    return tuple(joined)


def _best_candidate(
    segmented: Mapping[str, tuple[str, ...]],
    counts: Mapping[str, int],
    used: Counter[str],
    max_length: int,
) -> str | None:
    """The run of tokens with the largest gain, the first of equals; None without a gain."""
    runs: dict[str, Counter[str]] = {}  # uses of the candidate, and what it saves of its parts
    for word, tokens in segmented.items():
        for candidate in dict.fromkeys(_runs(tokens, max_length)):
            change = runs.setdefault(candidate, Counter())
            after = Counter(_joined(tokens, candidate))
            after.subtract(tokens)
            for token, difference in after.items():
                change[token] += counts[word] * difference

    def part(n: float) -> float:
        return n * math.log(n) if n > 0 else 0.0

    total = sum(used.values())

    def gain(change: Counter[str]) -> float:
        after = total + sum(change.values())
        tokens = sum(part(used[t] + d) - part(used[t]) for t, d in change.items())
        return tokens - part(after) + part(total)

    gains = {candidate: gain(change) for candidate, change in runs.items()}
    best = max(gains, key=lambda candidate: gains[candidate], default=None)
    return best if best is not None and gains[best] > 1e-9 * total else None


def _runs(tokens: tuple[str, ...], max_length: int) -> list[str]:
    """What two tokens or more that follow each other spell, up to a length."""
    runs = []
    for begin in range(len(tokens)):
        spelled = tokens[begin]
        for token in tokens[begin + 1 :]:
            spelled += token
            if len(spelled) > max_length:
                break
            runs.append(spelled)
    return runs
