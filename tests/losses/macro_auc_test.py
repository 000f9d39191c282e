from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses
from jaxref.metrics import macro_auc

LOSSES = {
    "pairwise": losses.macro_auc_pairwise_loss,
    "univariate": losses.macro_auc_univariate_loss,
    "reweighted": losses.macro_auc_reweighted_loss,
}
BASES = {
    "logistic": lambda t: np.log1p(np.exp(-t)),
    "hinge": lambda t: np.maximum(1 - t, 0),
    "exponential": lambda t: np.exp(-t),
}


def random_labels(n=10, labels=4, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.uniform(size=(n, labels)) < np.linspace(0.3, 0.7, labels)
    return rng.normal(size=(n, labels)).astype(np.float32), targets


def literal(name, scores, targets, base):
    """One loss per label in float64, as the formulas say."""
    ell, values = BASES[base], []
    for f, y in zip(np.float64(scores).T, targets.T):
        p, q = f[y], f[~y]
        values.append(
            {
                "pairwise": lambda: np.mean([ell(a - b) for a in p for b in q]),
                "univariate": lambda: (ell(p).sum() + ell(-q).sum()) / len(f),
                "reweighted": lambda: ell(p).mean() + ell(-q).mean(),
            }[name]()
        )
    return np.array(values)


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    @pytest.mark.parametrize("base", BASES)
    def test_matches_the_formula_and_its_finite_differences(self, name, base):
        scores, targets = random_labels()
        values, vjp = jax.vjp(lambda s: LOSSES[name](s, targets, base=base), scores)
        np.testing.assert_allclose(values, literal(name, scores, targets, base), rtol=1e-5)
        direction = np.random.default_rng(1).normal(size=scores.shape)
        sides = [
            literal(name, scores + sign * 1e-6 * direction, targets, base).sum() for sign in (1, -1)
        ]
        slope = np.sum(vjp(np.ones(4, "f"))[0] * direction)
        np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 2e-6, rtol=1e-3, atol=1e-5)

    def test_shards_give_value_and_gradient_of_the_whole(self, name):
        scores, targets = random_labels(16)
        axes = ("data", "fsdp")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
        sharded = jax.shard_map(
            partial(LOSSES[name], axis_name=axes),
            mesh=mesh,
            in_specs=(PartitionSpec(axes),) * 2,
            out_specs=PartitionSpec(),
        )
        weights = np.arange(1.0, 5, dtype=np.float32)

        def run(loss):
            return jax.jit(jax.value_and_grad(lambda s, y: weights @ loss(s, y)))(scores, targets)

        found, expected = run(sharded), run(LOSSES[name])
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)

    def test_unknown_targets_count_for_nothing(self, name):
        scores, targets = random_labels()
        where = np.arange(10)[:, None] < [10, 10, 7, 0]
        poisoned, unknown = np.where(where, scores, np.nan), np.where(where, targets, -1)
        values, vjp = jax.vjp(lambda s: LOSSES[name](s, unknown, where=where), poisoned)
        whole, part = (LOSSES[name](scores[:n], targets[:n]) for n in (10, 7))
        expected = [*whole[:2], part[2], 0]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        slope = vjp(np.ones(4, "f"))[0]
        assert np.all(slope[~where] == 0)
        assert np.all(np.isfinite(slope))

    def test_one_sided_labels_extreme_scores_and_types(self, name):
        targets = np.array([[1, 0, 1], [1, 0, 0]])
        for size in (1e4, -1e4, 0.0):
            scores = np.array([[size] * 3, [-size] * 3], np.float32)
            values, vjp = jax.vjp(lambda s: LOSSES[name](s, targets), scores)
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(vjp(np.ones(3, "f"))[0]))
            if name != "univariate":
                assert np.all(values[:2] == 0)
        half = jnp.asarray(random_labels()[0], jnp.bfloat16)
        targets = random_labels()[1]
        values = LOSSES[name](half, targets)
        assert values.dtype == jnp.bfloat16
        expected = LOSSES[name](half.astype(jnp.float32), targets).astype(jnp.bfloat16)
        np.testing.assert_array_equal(values, expected)
        assert np.all(LOSSES[name](half[:0], targets[:0]) == 0)

    def test_bad_input_is_named(self, name):
        scores, targets = random_labels()
        with pytest.raises(ValueError, match="targets must be 0 or 1"):
            LOSSES[name](scores, 2 * targets - 1)
        with pytest.raises(ValueError, match="targets must have shape"):
            LOSSES[name](scores, targets[:3])
        with pytest.raises(ValueError, match=r"scores must have shape \[n, K\]"):
            LOSSES[name](scores[0], targets[0])
        with pytest.raises(ValueError, match="base must be one of"):
            LOSSES[name](scores, targets, base="cubic")
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            LOSSES[name](targets, targets)


def test_univariate_loss_is_binary_cross_entropy():
    scores, targets = random_labels()
    theirs = optax.sigmoid_binary_cross_entropy(scores, targets).mean(axis=0)
    np.testing.assert_allclose(losses.macro_auc_univariate_loss(scores, targets), theirs, rtol=1e-5)


def test_class_counts_make_the_mean_over_batches_that_of_the_data():
    scores, targets = random_labels(12)
    loss = losses.macro_auc_reweighted_loss
    counts = targets.sum(0), (~targets).sum(0)
    batches = [
        loss(s, y, class_counts=counts)
        for s, y in zip(scores.reshape(3, 4, 4), targets.reshape(3, 4, 4))
    ]
    np.testing.assert_allclose(np.mean(batches, axis=0), loss(scores, targets), rtol=1e-5)
    absent = counts[0] * [0, 1, 1, 1], counts[1]
    assert loss(scores, targets, class_counts=absent)[0] == 0
    with pytest.raises(ValueError, match=r"class_counts\[1\] must be in"):
        loss(scores, targets, class_counts=(counts[0], -counts[1]))
    with pytest.raises(ValueError, match=r"class_counts\[1\] must have shape \(4,\)"):
        loss(scores, targets, class_counts=(counts[0], counts[1][:2]))


class TestClaims:
    @pytest.mark.claim("macro-auc")
    def test_rare_labels_need_pairs_or_weights(self):
        """Linear scores for positives that are narrow where negatives are wide, and the other way
        round: rare ones do not count in the shape that plain cross-entropy sees."""

        @partial(jax.jit, static_argnums=2)
        def fit(features, targets, name):
            loss = lambda w: LOSSES[name](features @ w[:2] + w[2], targets).mean()
            step = lambda _, w: w - 0.3 * jax.grad(loss)(w)
            return jax.lax.fori_loop(0, 200, step, jnp.zeros((3, 1)))

        rng = np.random.default_rng(0)

        def sample(n, share):
            targets = np.arange(n)[:, None] < share * n
            x = rng.normal(size=(n, 2)) * np.where(targets, [0.4, 2.5], [2.5, 0.4])
            return (x + 1.5 * targets).astype(np.float32), targets

        held_out, truth = sample(4000, 0.5)

        def areas(share):
            train = sample(400, share)
            fits = {name: fit(*train, name)[:2] for name in LOSSES}
            return {name: macro_auc(held_out @ w, truth) for name, w in fits.items()}

        found = {share: areas(share) for share in (0.5, 0.2, 0.1)}
        gaps = {s: min(a["pairwise"], a["reweighted"]) - a["univariate"] for s, a in found.items()}
        assert abs(gaps[0.5]) < 0.005
        assert 0.01 < gaps[0.2] < gaps[0.1]

    def test_inequalities_between_the_three(self):
        scores, targets = random_labels(20)
        pairwise = losses.macro_auc_pairwise_loss(scores, targets)
        assert pairwise.mean() / np.log(2) >= 1 - macro_auc(scores, targets)
        assert np.all(pairwise <= losses.macro_auc_reweighted_loss(2 * scores, targets) / 2)
        balanced = np.repeat([[True], [False]], 10, axis=0) & np.ones((1, 4), bool)
        np.testing.assert_allclose(
            losses.macro_auc_reweighted_loss(scores, balanced),
            2 * losses.macro_auc_univariate_loss(scores, balanced),
            rtol=1e-5,
        )

    def test_chunks_of_pairs_change_nothing(self):
        scores, targets = random_labels()
        loss = lambda s, size: losses.macro_auc_pairwise_loss(s, targets, chunk_size=size).sum()
        expected = jax.value_and_grad(loss)(scores, None)
        found = jax.value_and_grad(loss)(scores, 3)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-7)
