import math
from pathlib import Path

import numpy as np
import pytest

from jaxref.data import build_subword_vocabulary, maximum_likelihood_segmentation

TOKENIZERS = np.load(Path(__file__).parents[1] / "oracles" / "unigram_segmentation.npz")
WORDS = {
    "low": 5,
    "lower": 2,
    "newest": 6,
    "widest": 3,
    "newer": 4,
    "wider": 3,
    "slow": 2,
    "slowest": 1,
    "banana": 2,
}


def likelihood(log_p):
    return sum(n * maximum_likelihood_segmentation(w, log_p)[1] for w, n in WORDS.items())


def all_segmentations(word):
    if not word:
        yield ()
    for end in range(1, len(word) + 1):
        yield from ((word[:end], *rest) for rest in all_segmentations(word[end:]))


class TestSegmentation:
    def test_matches_tokenizers(self):
        log_p = dict(zip(TOKENIZERS["pieces"].tolist(), TOKENIZERS["log_probabilities"].tolist()))
        for word, expected in zip(TOKENIZERS["words"], TOKENIZERS["segmentations"]):
            ours = maximum_likelihood_segmentation(str(word), log_p)
            assert " ".join(ours.tokens) == expected
            assert ours.log_probability == pytest.approx(sum(log_p[t] for t in ours.tokens))

    def test_is_the_best_of_all_there_are(self):
        rng = np.random.default_rng(0)
        for _ in range(30):
            word = "".join(rng.choice(list("ab"), size=7))
            pieces = {word[i:j] for i in range(7) for j in range(i + 1, min(8, i + 4))}
            log_p = {piece: -float(rng.exponential()) for piece in sorted(pieces)}
            best = max(
                sum(log_p[t] for t in tokens)
                for tokens in all_segmentations(word)
                if set(tokens) <= log_p.keys()
            )
            assert maximum_likelihood_segmentation(word, log_p)[1] == pytest.approx(best)

    def test_edges(self):
        assert maximum_likelihood_segmentation("", {}) == ((), 0.0)
        assert maximum_likelihood_segmentation("aa", {"a": -1.0, "aa": -2.0}).tokens == ("aa",)
        with pytest.raises(ValueError, match="word 'ab' cannot be written"):
            maximum_likelihood_segmentation("ab", {"a": -1.0})
        with pytest.raises(ValueError, match="word 'a' cannot be written"):
            maximum_likelihood_segmentation("a", {"a": -math.inf})
        with pytest.raises(ValueError, match="empty token"):
            maximum_likelihood_segmentation("a", {"a": -1.0, "": -1.0})


class TestVocabulary:
    """The marked claim of the paper is beside its attention."""

    def test_likelihood_never_falls_as_the_vocabulary_grows(self):
        characters = len(set("".join(WORDS)))
        sizes = range(characters, characters + 9)
        vocabularies = [build_subword_vocabulary(WORDS, size) for size in sizes]
        for size, smaller, larger in zip(sizes, vocabularies, vocabularies[1:]):
            assert len(larger) == size + 1
            assert list(smaller) == list(larger)[:-1]
        assert np.all(np.diff([likelihood(v) for v in vocabularies]) > 0)

    def test_the_first_token_has_the_largest_gain_of_all_substrings(self):
        characters = build_subword_vocabulary(WORDS, len(set("".join(WORDS))))
        first = list(build_subword_vocabulary(WORDS, len(characters) + 1))[-1]

        def after(candidate):
            """Likelihood with the candidate in all of its places, at its best probabilities."""
            used = {}
            for word, count in WORDS.items():
                at = 0
                while at < len(word):
                    token = candidate if word.startswith(candidate, at) else word[at]
                    used[token] = used.get(token, 0) + count
                    at += len(token)
            total = sum(used.values())
            return sum(n * math.log(n / total) for n in used.values())

        candidates = {
            word[i:j]
            for word in WORDS
            for i in range(len(word))
            for j in range(i + 2, len(word) + 1)
        }
        assert first == max(candidates, key=after)

    def test_probabilities_are_those_of_the_uses(self):
        vocabulary = build_subword_vocabulary({"ab": 3, "b": 1}, 3)
        assert list(vocabulary) == ["a", "b", "ab"]
        assert vocabulary["ab"] == pytest.approx(math.log(3 / 4))
        assert vocabulary["b"] == vocabulary["a"] == pytest.approx(math.log(1 / 4))
        assert maximum_likelihood_segmentation("ba", vocabulary).tokens == ("b", "a")

    def test_it_stops_without_a_gain_and_at_the_longest_token(self):
        assert list(build_subword_vocabulary({"ab": 1}, 100)) == ["a", "b", "ab"]
        assert list(build_subword_vocabulary({"ab": 1, "ba": 1}, 100, max_length=1)) == ["a", "b"]
        long = build_subword_vocabulary({"abcdefghij": 4}, 100, max_length=3)
        assert max(map(len, long)) == 3

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="word_counts must count"):
            build_subword_vocabulary({"": 3, "a": 0}, 3)
        with pytest.raises(ValueError, match="word_counts must count"):
            build_subword_vocabulary({"a": -1}, 3)
        with pytest.raises(ValueError, match="vocabulary_size must be in"):
            build_subword_vocabulary({"abc": 1}, 2)
        with pytest.raises(ValueError, match="max_length must be in"):
            build_subword_vocabulary({"abc": 1}, 4, max_length=0)
