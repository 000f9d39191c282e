from pathlib import Path

import numpy as np
import pytest

from jaxref import metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_metrics.npz")
CANDIDATES = [text.split() for text in PEER["candidates"]]
REFERENCES = [[text.split() for text in texts] for texts in PEER["references"]]


def test_bleu_matches_nltk():
    ours = [metrics.bleu(CANDIDATES, REFERENCES), metrics.bleu(CANDIDATES, REFERENCES, max_order=2)]
    np.testing.assert_allclose(ours, PEER["bleu"], rtol=1e-12)


def test_rouge_matches_rouge_score():
    ours = [
        [metrics.rouge(text, texts[0], order=order) for order in (1, 2, None)]
        for text, texts in zip(CANDIDATES, REFERENCES)
    ]
    np.testing.assert_allclose(ours, PEER["rouge"], rtol=1e-12)


def test_meteor_and_error_rate_match_nltk():
    ours = metrics.meteor(*(text.split() for text in PEER["distinct"]))
    np.testing.assert_allclose(ours, PEER["meteor"], rtol=1e-12)
    ours = metrics.token_error_rate(CANDIDATES, [texts[0] for texts in REFERENCES])
    np.testing.assert_allclose(ours, PEER["error_rate"], rtol=1e-12)


def test_bleu_is_short_of_one_for_short_and_repeated_words():
    reference = ["the", "cat", "is", "on", "the", "mat"]
    assert metrics.bleu([reference], [[reference]]) == 1
    often = metrics.bleu([["the"] * 7], [[reference]], max_order=1)
    assert often == pytest.approx(2 / 7)
    twice = metrics.bleu([["the"] * 7], [[reference, reference]], max_order=1)
    assert twice == often  # the most of any reference, and not of all
    short = metrics.bleu([reference[:4]], [[reference]])
    assert short == pytest.approx(np.exp(1 - 6 / 4))
    assert metrics.bleu([reference[::-1]], [[reference]]) == 0


def test_meteor_charges_for_pieces():
    reference = ["a", "b", "c", "d"]
    whole, turned = (
        metrics.meteor(reference, reference),
        metrics.meteor(["c", "d", "a", "b"], reference),
    )
    assert whole == pytest.approx(1 - 0.5 / 64)
    assert turned == pytest.approx(1 - 0.5 / 8)
    twice = metrics.meteor(["a", "b", "a"], ["a", "b"], gamma=0.0)
    assert twice == pytest.approx((2 / 3) / (0.9 * 2 / 3 + 0.1))


def test_edges_and_bad_input():
    assert metrics.rouge([], ["a"]) == metrics.rouge([], []) == metrics.meteor([], ["a"]) == 0
    assert metrics.bleu([[]], [[["a"]]]) == 0
    assert metrics.token_error_rate([""], [""]) == 0
    assert metrics.token_error_rate(["a"], [""]) == np.inf
    assert metrics.token_error_rate(["abc", ""], ["axc", "xy"]) == pytest.approx(3 / 5)
    assert metrics.exact_match(["a b", "c"], [["a b"], ["d", "e"]]) == 0.5
    for metric in (metrics.bleu, metrics.token_error_rate, metrics.exact_match):
        with pytest.raises(ValueError, match="as many"):
            metric([["a"]], [])
        with pytest.raises(ValueError, match="at least one"):
            metric([], [])
    with pytest.raises(ValueError, match="at least one reference"):
        metrics.bleu([["a"]], [[]])
    with pytest.raises(ValueError, match="order must be in"):
        metrics.rouge(["a"], ["a"], order=0)
    with pytest.raises(ValueError, match="gamma must be in"):
        metrics.meteor(["a"], ["a"], gamma=2.0)
