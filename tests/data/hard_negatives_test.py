"""The marked claim of the paper is in tests/losses/angular_margin_median_test.py."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxref import data

LABELS = np.repeat(np.arange(5), 8)
PREDICTIONS = LABELS.copy()
PREDICTIONS[[8, 9, 17]] = 0  # of other classes, taken for class 0
PREDICTIONS[[0, 1]] = 2  # of class 0, taken for class 2


@partial(jax.jit, static_argnames="tuple_size")
def draws(anchors, labels, tuple_size=3):
    return data.hard_negative_tuple_indices(
        labels, PREDICTIONS, anchors, key=jax.random.key(0), tuple_size=tuple_size
    )


class TestHardNegatives:
    def test_kinds_come_as_often_as_they_should(self):
        others = 1 / 4  # chance of a class that is drawn at random
        for anchor, hard_share, confused_share in ((4, 0.5, 0), (0, 0.33, 0.67 / 2)):
            tuples = np.array(draws(np.full(4000, anchor), LABELS))
            assert np.all(tuples[:, 0] == anchor)
            positives = set(tuples[:, 1])
            allowed = set(range(2, 8)) if anchor == 0 else set(range(8)) - {4}
            assert positives == allowed
            negatives = tuples[:, 2]
            assert np.all(LABELS[negatives] != 0)
            at_random = 1 - hard_share - confused_share
            # of classes 1 and 2, the hard ones are 2 of 8 and 1 of 8
            hard = np.mean(PREDICTIONS[negatives] == 0)
            expected = hard_share + confused_share / 8 + at_random * others * 3 / 8
            np.testing.assert_allclose(hard, expected, atol=0.03)
            of_last = np.mean(LABELS[negatives] == 4)
            np.testing.assert_allclose(of_last, at_random * others, atol=0.03)

    def test_no_example_comes_twice_and_what_is_lacking_is_minus_one(self):
        tuples = np.array(draws(np.full(20, 4), LABELS, tuple_size=36))
        assert np.all(np.sort(tuples[:, 2:34], axis=1) == np.arange(8, 40))
        assert np.all(tuples[:, 34:] == -1)
        alone = np.array(draws(np.full(4000, 4), np.where(np.arange(40) == 4, 9, LABELS)))
        assert np.all(alone[:, 1] == -1)

    def test_bad_input_is_named(self):
        draw = partial(data.hard_negative_tuple_indices, key=jax.random.key(0))
        anchors = np.array([0])
        with pytest.raises(ValueError, match="predictions must have shape"):
            draw(LABELS, PREDICTIONS[1:], anchors)
        with pytest.raises(ValueError, match="anchors must have one axis"):
            draw(LABELS, PREDICTIONS, anchors[0])
        with pytest.raises(TypeError, match="labels must be integers"):
            draw(LABELS > 0, PREDICTIONS, anchors)
        for option, value in (("tuple_size", 1), ("hard_probability", 1.5)):
            with pytest.raises(ValueError, match=f"{option} must be in"):
                draw(LABELS, PREDICTIONS, anchors, **{option: value})
        assert draw(LABELS, PREDICTIONS, anchors[:0]).shape == (0, 8)
