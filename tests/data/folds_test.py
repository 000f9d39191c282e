import jax
import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from jaxref.data import stratified_k_fold


class TestStratifiedKFold:
    def test_classes_are_as_even_as_those_of_scikit_learn(self):
        labels = np.random.default_rng(0).choice(3, p=[0.6, 0.25, 0.15], size=83)
        folds = jax.jit(lambda y, key: stratified_k_fold(y, num_folds=5, key=key))
        fold = np.asarray(folds(labels, jax.random.key(0)))
        assert fold.dtype == np.int32
        counts = np.stack([np.bincount(labels[fold == k], minlength=3) for k in range(5)])
        peer = StratifiedKFold(5).split(labels, labels)
        theirs = np.stack([np.bincount(labels[test], minlength=3) for _, test in peer])
        np.testing.assert_array_equal(np.sort(counts, axis=0), np.sort(theirs, axis=0))
        assert np.ptp(counts.sum(axis=1)) <= 1

    def test_another_key_is_another_deal(self):
        labels = np.arange(40) % 2
        first, again, other = (
            np.asarray(stratified_k_fold(labels, num_folds=4, key=jax.random.key(seed)))
            for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert np.mean(first != other) > 0.3
        assert len(np.unique(first[:8])) > 1  # not in the order given

    def test_bad_input_is_named(self):
        key = jax.random.key(0)
        with pytest.raises(ValueError, match="num_folds must be in"):
            stratified_k_fold(np.zeros(3, int), num_folds=4, key=key)
        with pytest.raises(ValueError, match="labels must have shape"):
            stratified_k_fold(np.zeros((3, 2), int), num_folds=2, key=key)
        with pytest.raises(TypeError, match="labels must be integers"):
            stratified_k_fold(np.zeros(3), num_folds=2, key=key)
