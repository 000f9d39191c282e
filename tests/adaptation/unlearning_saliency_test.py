from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy.stats import chisquare

from jaxref.adaptation.unlearning import unlearning_metrics
from jaxref.adaptation.unlearning_saliency import (
    loreun_loss,
    loss_reweighting,
    masked_updates,
    random_label_forget_loss,
    saliency_mask,
    salun_classification_loss,
    salun_diffusion_loss,
)
from jaxref.losses import softmax_cross_entropy

RATES = np.array([0.001, 0.002, 0.004, 0.008, 0.016], "f")


def predicted(params, x):
    hidden = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def initial(key):
    first, second = jax.random.split(key)
    return {
        "in": {"kernel": 0.2 * jax.random.normal(first, (20, 32)), "bias": jnp.zeros(32)},
        "out": {"kernel": 0.15 * jax.random.normal(second, (32, 10)), "bias": jnp.zeros(10)},
    }


def trained(loss, params, optimizer, steps, key):
    def step(i, carry):
        params, state = carry
        gradient = jax.grad(loss)(params, jax.random.fold_in(key, i))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]


def clusters(seed):
    """Ten that overlap: 40 examples to forget, 360 to retain, 400 that are new."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(10, 20))
    labels = rng.integers(10, size=800)
    x = (centres[labels] + 1.8 * rng.normal(size=(800, 20))).astype("f")
    return [(x[part], labels[part]) for part in np.split(np.arange(800), [40, 400])]


@jax.jit
@jax.vmap
def unlearned(forget, retain, test, key):
    """Metrics `[models, rates]` of a model, of one trained anew, and of what is made of the first
    by random labels with 2 masks, ascent with 3, and ascent beside retaining at 2 temperatures."""

    def losses(params, data):
        return softmax_cross_entropy(predicted(params, data[0]), data[1])

    @jax.vmap
    def models(start, weight):
        def loss(params, _):
            return (weight * losses(params, forget).sum() + losses(params, retain).sum()) / 400

        return trained(loss, start, optax.adam(1e-2), 150, key)

    starts = jax.vmap(initial)(jax.random.split(key))
    two = models(starts, np.array([1.0, 0.0]))
    model = jax.tree.map(lambda x: x[0], two)
    salient = saliency_mask(lambda p, batch: losses(p, batch).mean(), model, [forget])
    masks = jax.tree.map(lambda m: jnp.stack([m | True, m, ~m]), salient)

    def metrics(params):
        return unlearning_metrics(
            *(x for data in (forget, retain, test) for x in (predicted(params, data[0]), data[1]))
        )

    def random_labels(params, key, _):
        logits = [predicted(params, data[0]) for data in (forget, retain)]
        return salun_classification_loss(logits[0], forget[1], logits[1], retain[1], key=key)

    def ascent(params, *_):
        return -losses(params, forget).mean()

    def loreun(params, _, temperature):
        known = losses(params, forget)
        return loreun_loss(-known, losses(params, retain), known, temperature=temperature)

    def after(loss, temperatures, masks):
        def at(temperature, mask, rate):
            optimizer = optax.chain(optax.sgd(rate, momentum=0.9), masked_updates(mask))
            loss_at = lambda params, key: loss(params, key, temperature)
            return trained(loss_at, model, optimizer, 60, key)

        at_all = jax.vmap(jax.vmap(at, (None, None, 0)), (0, 0, None))
        return at_all(temperatures, masks, RATES)

    first = lambda n: jax.tree.map(lambda m: m[:n], masks)
    everywhere = jax.tree.map(lambda m: m | True, first(2))
    every = [
        jax.tree.map(lambda x: jnp.stack([x] * len(RATES), axis=1), two),
        after(random_labels, np.zeros(2), first(2)),
        after(ascent, np.zeros(3), masks),
        after(loreun, np.array([1e6, 1.0]), everywhere),
    ]
    every = jax.tree.map(lambda *x: jnp.concatenate(x), *every)
    return jnp.stack(jax.vmap(jax.vmap(metrics))(every), axis=-1)


@cache
def experiment():
    """How much of the forget set is misclassified, of three seeds, and mean gaps to the model that
    was trained anew, `[models, rates]` each."""
    data = jax.tree.map(lambda *x: np.stack(x), *(clusters(seed) for seed in range(3)))
    metrics = np.asarray(unlearned(*data, jax.random.split(jax.random.key(0), 3)))
    gaps = np.abs(metrics - metrics[:, 1:2]).mean(axis=(0, -1))
    return metrics[..., 0].mean(axis=0), gaps


class TestClaims:
    @pytest.mark.claim("salun")
    def test_the_salient_weights_alone_forget_and_come_closer_to_a_retrained_model(self):
        """A tenth of the training set is unlearned. Ascent on the salient half of the weights
        forgets it as ascent on all does, and ascent on the other half nothing. With random labels
        the salient half ends closer to a model that was trained anew, over all rates, than all
        weights do, and much closer than gradient ascent."""
        forgotten, gaps = experiment()
        assert np.all(forgotten[0] < 1e-6)
        assert np.all(forgotten[1] > 0.3)
        everywhere, salient, rest = forgotten[4:7, -1]
        assert salient > 0.8 * everywhere > 0.6
        assert rest < 0.2
        without_mask, salun, ascent = gaps[2:5].mean(axis=1)
        assert salun < 0.95 * without_mask
        assert salun < 0.7 * ascent

    @pytest.mark.claim("loreun")
    def test_weights_for_what_is_known_keep_ascent_from_going_too_far(self):
        """Ascent on the forget set beside descent on the rest: with weights the average gap to a
        model that was trained anew, over rates and at the best, is below that without."""
        plain, weighted = experiment()[1][7:]
        assert weighted.mean() < 0.8 * plain.mean()
        assert weighted.min() < 0.7 * plain.min()


def two_layers(seed=0):
    """Weights of a linear map with a scale, and two batches of regression."""
    rng = np.random.default_rng(seed)
    params = {"scale": rng.normal(size=(2,)).astype("f"), "w": rng.normal(size=(3, 2)).astype("f")}
    batches = [(rng.normal(size=(4, 3)).astype("f"), rng.normal(size=(4, 2)).astype("f"))] * 2
    batches[1] = (-2 * batches[1][0], batches[1][1])
    return params, batches


def squares(params, batch):
    x, y = batch
    return jnp.sum((x @ params["w"] * params["scale"] - y) ** 2)


def literal_magnitudes(params, batches):
    """|Σ of both gradients|, of the scales and then of the weights, by hand in float64."""
    scale, w = params["scale"].astype(np.float64), params["w"].astype(np.float64)
    total_scale, total_w = np.zeros(2), np.zeros((3, 2))
    for x, y in batches:
        residual = 2 * (x @ w * scale - y)
        total_scale += np.sum(residual * (x @ w), axis=0)
        total_w += x.T @ (residual * scale)
    return np.abs(total_scale), np.abs(total_w)


class TestMask:
    def test_is_the_largest_sums_of_gradients(self):
        params, batches = two_layers()
        magnitudes = literal_magnitudes(params, batches)
        flat = np.concatenate([m.ravel() for m in magnitudes])
        fractions = (0.0, 0.2, 0.5, 0.9, 1.0)

        @jax.jit
        def masks(params):
            of = lambda loss, **options: saliency_mask(loss, params, batches, **options)
            return (
                [of(squares, keep_fraction=k) for k in fractions],
                of(lambda p, b: -3 * squares(p, b)),
                of(squares, scope="leaf", keep_fraction=0.7),
                of(squares, threshold=float(np.median(flat))),
            )

        nested, negative, by_leaf, above = masks(params)
        before = np.zeros(8, bool)
        for k, mask in zip(fractions, nested):
            kept = np.concatenate([mask["scale"], mask["w"].ravel()])
            assert kept.sum() == int(k * 8)
            assert set(np.nonzero(kept)[0]) == set(np.argsort(-flat)[: int(k * 8)])
            assert np.all(kept >= before)
            before = kept
        for name in params:
            np.testing.assert_array_equal(negative[name], nested[2][name])
            np.testing.assert_array_equal(above[name], nested[2][name])
        for mask, m in zip((by_leaf["scale"], by_leaf["w"]), magnitudes):
            number = int(0.7 * m.size)
            expected = np.argsort(-m.ravel())[:number]
            assert set(np.nonzero(np.ravel(mask))[0]) == set(expected)

    def test_gradients_that_cancel_do_not_count_and_ties_rank_in_order(self):
        loss = lambda p, sign: sign * 9 * p["a"] + jnp.sum(p["b"])
        params = {"a": jnp.float32(1), "b": jnp.ones(4, jnp.bfloat16)}
        mask = saliency_mask(loss, params, iter([1.0, -1.0]), keep_fraction=0.4)
        assert not mask["a"]
        np.testing.assert_array_equal(mask["b"], [True, True, False, False])

    def test_bad_input(self):
        params, batches = two_layers()
        for options, message in (
            ({"keep_fraction": 1.1}, r"keep_fraction must be in \[0, 1\], got 1.1"),
            ({"scope": "layer"}, "scope must be 'global' or 'leaf', got 'layer'"),
            ({"threshold": -1.0}, "threshold must be in"),
        ):
            with pytest.raises(ValueError, match=message):
                saliency_mask(squares, params, batches, **options)
        with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
            saliency_mask(squares, params, [])
        with pytest.raises(TypeError, match="must be a boolean or an array of booleans"):
            masked_updates({"w": np.ones(2)}).init({"w": np.ones(2)})


class TestUpdates:
    def test_no_momentum_and_no_decay_moves_what_is_masked_if_they_come_before(self):
        params, batches = two_layers()
        mask = {
            "scale": np.array([True, False]),
            "w": np.random.default_rng(1).uniform(size=(3, 2)) < 0.5,
        }
        last = optax.chain(optax.adamw(0.1, weight_decay=0.1), masked_updates(mask))
        first = optax.chain(masked_updates(mask), optax.adamw(0.1, weight_decay=0.1))
        parts = optax.multi_transform(
            {"masked": last, "free": optax.sgd(0.1)}, {"scale": "free", "w": "masked"}
        )

        @partial(jax.jit, static_argnums=0)
        def stepped(optimizer):
            loss = lambda p, _: squares(p, batches[0])
            return trained(loss, params, optimizer, 5, jax.random.key(0))

        moved = {name: np.not_equal(x, params[name]) for name, x in stepped(last).items()}
        for name, m in mask.items():
            np.testing.assert_array_equal(moved[name], m)
        assert np.all(np.not_equal(stepped(first)["w"], params["w"]))
        in_part = stepped(parts)
        np.testing.assert_array_equal(np.not_equal(in_part["w"], params["w"]), mask["w"])
        assert np.all(np.not_equal(in_part["scale"], params["scale"]))


class TestLosses:
    def test_random_labels_are_all_others_alike(self):
        labels = np.repeat(np.arange(5), 2000)
        logits = np.tile(np.arange(5, dtype="f"), (len(labels), 1))
        loss = jax.jit(random_label_forget_loss, static_argnames="exclude_true")
        costs = -np.asarray(jax.nn.log_softmax(logits[0]))
        for exclude, others in ((True, 4), (False, 5)):
            drawn = loss(logits, labels, key=jax.random.key(1), exclude_true=exclude)
            which = np.argmin(np.abs(np.asarray(drawn)[:, None] - costs), axis=-1)
            np.testing.assert_allclose(drawn, costs[which], rtol=1e-5)
            counts = np.bincount(labels * 5 + which, minlength=25).reshape(5, 5)
            assert np.all((counts == 0) == (exclude & np.eye(5, dtype=bool)))
            assert chisquare(counts[counts > 0].reshape(5, others), axis=1).pvalue.min() > 1e-3
        wrong = loss(logits[:3], np.array([-1, 5, 0]), key=jax.random.key(2))
        np.testing.assert_array_equal(np.isnan(wrong), [True, True, False])

    def test_objectives_are_means_over_what_counts(self):
        rng = np.random.default_rng(3)
        forget, retain = (rng.normal(size=(n, 4)).astype("f") for n in (8, 16))
        labels, others = rng.integers(4, size=8), rng.integers(4, size=16)
        masks = {
            "forget_where": rng.uniform(size=8) < 0.6,
            "retain_where": rng.uniform(size=16) < 0.6,
        }
        key = jax.random.key(4)
        mean = lambda losses, name: np.asarray(losses, np.float64)[masks[name]].mean()
        classification = jax.jit(salun_classification_loss)
        found = classification(forget, labels, retain, others, key=key, retain_weight=0.3, **masks)
        chance = jax.jit(random_label_forget_loss)(forget, labels, key=key)
        plain = jax.jit(softmax_cross_entropy)(retain, others)
        expected = mean(chance, "forget_where") + 0.3 * mean(plain, "retain_where")
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        target, pseudo = rng.normal(size=(16, 4)).astype("f"), forget[::-1]
        loss = partial(salun_diffusion_loss, retain_weight=0.3, **masks)
        value, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
            forget, pseudo, retain, target
        )
        squared = [np.mean((a - b) ** 2, axis=1) for a, b in ((forget, pseudo), (retain, target))]
        expected = mean(squared[0], "forget_where") + 0.3 * mean(squared[1], "retain_where")
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        counted = masks["forget_where"][:, None]
        np.testing.assert_allclose(
            slopes[0], counted * (forget - pseudo) / 2 / counted.sum(), rtol=1e-5
        )
        assert not np.any(slopes[1])
        empty = jax.jit(partial(loss, forget_where=False, retain_where=False))
        assert empty(forget, pseudo, retain, target) == 0

    def test_bad_input(self):
        x, labels = np.zeros((3, 2), "f"), np.zeros(3, int)
        key = jax.random.key(0)
        with pytest.raises(ValueError, match="logits must have at least two classes, got shape"):
            random_label_forget_loss(x[:, :1], labels, key=key)
        with pytest.raises(TypeError, match="labels must be integers, got float32"):
            random_label_forget_loss(x, x[:, 0], key=key)
        with pytest.raises(
            ValueError, match=r"pseudo_noise must have shape \(3, 2\), got \(2, 2\)"
        ):
            salun_diffusion_loss(x, x[:2], x, x)
        with pytest.raises(ValueError, match="retain_weight must be in"):
            salun_diffusion_loss(x, x, x, x, retain_weight=-1.0)
        with pytest.raises(ValueError, match="temperature must be in"):
            loss_reweighting(x, temperature=0.0)
        with pytest.raises(ValueError, match=r"weighting_losses must have shape \(3, 2\)"):
            loreun_loss(x, x, x[:2])


class TestWeights:
    def test_matches_the_formula(self):
        rng = np.random.default_rng(5)
        losses = rng.exponential(size=12).astype("f")
        where = rng.uniform(size=12) < 0.7

        @jax.jit
        def weights(losses):
            return [
                loss_reweighting(losses, temperature=t, normalize=n, where=where)
                for t in (0.5, 1.0, 1e6)
                for n in (True, False)
            ]

        found = weights(losses)
        for i, t in enumerate((0.5, 1.0, 1e6)):
            plain = np.where(where, np.exp(-losses.astype(np.float64) / t), 0)
            np.testing.assert_allclose(found[2 * i + 1], plain, rtol=1e-5)
            np.testing.assert_allclose(found[2 * i], plain * where.sum() / plain.sum(), rtol=1e-5)
        np.testing.assert_allclose(weights(losses + 3)[2], found[2], rtol=1e-5)
        np.testing.assert_allclose(found[4], where, rtol=1e-4)
        logits, labels = rng.normal(size=(5, 4)).astype("f"), rng.integers(4, size=5)
        known = loss_reweighting(softmax_cross_entropy(logits, labels), normalize=False)
        probs = np.asarray(jax.nn.softmax(logits))[np.arange(5), labels]
        np.testing.assert_allclose(known, probs, rtol=1e-5)

    def test_extremes(self):
        losses = jnp.array([0.0, 1e4, 2e4, jnp.nan], jnp.float16)
        where = jnp.array([True, True, True, False])
        weights = jax.jit(loss_reweighting)(losses, where=where)
        assert weights.dtype == jnp.float16
        np.testing.assert_array_equal(weights, [3, 0, 0, 0])
        np.testing.assert_array_equal(loss_reweighting(losses, where=False), np.zeros(4))
        none = loreun_loss(losses, losses, losses, forget_where=False, retain_where=False)
        assert none == 0

    def test_no_gradient_passes_through_weights_and_sets_may_be_spread_over_devices(self):
        rng = np.random.default_rng(6)
        arrays = [rng.exponential(size=16).astype("f") for _ in range(3)]
        arrays += list(rng.uniform(size=(2, 16)) < 0.7)

        def both(forget, retain, known, forget_where, retain_where, axis_name=None):
            loss = lambda *losses: loreun_loss(
                *losses,
                temperature=0.7,
                retain_weight=0.4,
                forget_where=forget_where,
                retain_where=retain_where,
                axis_name=axis_name,
            )
            return jax.value_and_grad(loss, argnums=(0, 1, 2))(forget, retain, known)

        rows = PartitionSpec("data")
        spread = jax.shard_map(
            partial(both, axis_name="data"),
            mesh=Mesh(np.array(jax.devices()), "data"),
            in_specs=rows,
            out_specs=(PartitionSpec(), (rows, rows, rows)),
        )
        value, slopes = jax.jit(both)(*arrays)
        forget, retain, known, counts, others = arrays
        weights = np.where(counts, np.exp(-known / 0.7), 0)
        weights /= weights.sum()
        expected = [weights, 0.4 * others / others.sum(), 0 * known]
        np.testing.assert_allclose(value, expected[0] @ forget + expected[1] @ retain, rtol=1e-5)
        for slope, exact in zip(slopes, expected):
            np.testing.assert_allclose(slope, exact, rtol=1e-5, atol=1e-8)
        spread_value, spread_slopes = jax.jit(spread)(*arrays)
        np.testing.assert_allclose(spread_value, value, rtol=1e-5)
        for ours, plain in zip(spread_slopes, slopes):
            np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-8)
