import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref.quantization import (
    adapt,
    adapt_cost,
    adapt_penalty,
    adapt_precision_init,
    adapt_precision_update,
    adapt_quantize,
)
from tests.quantization.fixed_point_test import push_up64

KEY = jax.random.key(0)


def grid_params():
    rng = np.random.default_rng(0)
    grid = lambda *shape: (rng.integers(-4, 5, size=shape) / 8).astype(np.float32)
    return {
        "a": {"bias": grid(3), "kernel": grid(2, 3)},
        "b": {"bias": grid(2), "kernel": grid(3, 2)},
    }


def push_down64(w, word, fraction, bins):
    """The search by a scan; grid weights round without chance."""

    def kl(word, fraction):
        top = 2.0 ** (word - fraction - 1)
        rounded = np.clip(np.floor(w * 2.0**fraction) / 2.0**fraction, -top, top - 2.0**-fraction)
        edges = np.linspace(w.min(), w.max(), bins + 1)
        inside = np.clip(rounded, w.min(), w.max())
        p, q = (np.histogram(v, edges)[0] / w.size for v in (w, inside))
        return np.inf if np.any((p > 0) & (q == 0)) else np.sum((p * np.log(p / q))[p > 0])

    with np.errstate(all="ignore"):
        fraction = next((f for f in range(4, fraction) if kl(word, f) <= 1e-2), fraction)
        word = next((n for n in range(fraction, word) if kl(n, fraction) <= 1e-2), word)
    return word, fraction


def update64(state, weights, gradients, loss):
    """A step of the specification on lists, in float64."""
    window = int(np.mean(state["lookback"]))
    if len(state["losses"]) >= window:
        mean = abs(np.mean(state["losses"][-window:]))
        state["strategy"] = min(state["strategy"] + 1, 2) if abs(loss) >= mean else 0
    state["losses"].append(abs(loss))
    for i, (w, g) in enumerate(zip(weights, gradients)):
        state["window"][i].append(g.astype(np.float64))
        norms = sum(np.linalg.norm(g) for g in state["window"][i])
        diversity = norms / np.linalg.norm(sum(state["window"][i]))
        fresh = np.ceil(np.clip(12 / diversity, 3, 12))
        state["lookback"][i] = int(np.ceil(0.33 * fresh + 0.67 * state["lookback"][i] - 1e-4))
        state["resolution"][i] += (state["lookback"][i] == 12) - (state["lookback"][i] == 3)
        state["resolution"][i] = int(np.clip(state["resolution"][i], 1, 20))
        if len(state["window"][i]) >= state["lookback"][i]:
            lengths = push_down64(w, *state["lengths"][i], state["resolution"][i])
            strategy = ("min", "mean", "max")[state["strategy"]]
            state["lengths"][i] = push_up64(*lengths, diversity, strategy)
            state["window"][i] = []
    return state


class TestAdaptPrecision:
    def test_follows_the_specification(self):
        params = grid_params()
        weights = [params["a"]["kernel"], params["b"]["kernel"]]
        state = adapt_precision_init(params, lookback=4, resolution=18, max_lookback=12)
        expected = {
            "lengths": [(8, 4), (8, 4)],
            "lookback": [4, 4],
            "resolution": [18, 18],
            "window": [[], []],
            "strategy": 0,
            "losses": [],
        }
        update = jax.jit(
            lambda state, gradients, loss, key: adapt_precision_update(
                state, params, gradients, loss, key, min_lookback=3, max_resolution=20
            )
        )
        rng = np.random.default_rng(2)
        strategies, formats = set(), set()
        for step in range(40):
            common = 0.2 if step < 25 else 3.0
            noise = lambda x: (rng.normal(size=x.shape) + common).astype(np.float32)
            gradients = jax.tree.map(noise, params)
            loss = float(1 + 0.3 * np.sin(step / 3))
            state = update(state, gradients, loss, jax.random.fold_in(KEY, step))
            used = [gradients["a"]["kernel"], gradients["b"]["kernel"]]
            expected = update64(expected, weights, used, loss)
            ours = list(zip(state.word_length.tolist(), state.fraction_length.tolist()))
            assert ours == expected["lengths"], step
            assert state.lookback.tolist() == expected["lookback"]
            assert state.resolution.tolist() == expected["resolution"]
            assert state.window_count.tolist() == [len(w) for w in expected["window"]]
            assert int(state.strategy) == expected["strategy"]
            strategies.add(int(state.strategy))
            formats.update(ours)
        assert strategies == {0, 1, 2}
        assert len(formats) > 3

    def test_biases_have_their_layers_format(self):
        params = jax.tree.map(lambda x: jnp.full_like(x, 3.3), grid_params())
        state = adapt_precision_init(params)._replace(
            word_length=jnp.array([4, 12]), fraction_length=jnp.array([2, 4])
        )
        quantized = adapt_quantize(params, state, key=KEY)
        for leaf in jax.tree.leaves(quantized["a"]):
            np.testing.assert_array_equal(leaf, 1.75)
        for leaf in jax.tree.leaves(quantized["b"]):
            assert set(np.unique(leaf)) <= {3.25, 3.3125}
        gradient = jax.grad(lambda p: adapt_quantize(p, state, key=KEY)["a"]["bias"].sum())(params)
        np.testing.assert_array_equal(gradient["a"]["bias"], 1.0)
        np.testing.assert_array_equal(gradient["b"]["bias"], 0.0)

    def test_penalty_and_cost(self):
        params = {"a": jnp.array([[1.0, 0.0, -2.0, 0.0]]), "b": jnp.ones((2, 6)), "c": jnp.ones(3)}
        state = adapt_precision_init(params)._replace(word_length=jnp.array([8, 16]))
        np.testing.assert_allclose(adapt_cost(params, state), (4 / 8 + 12 / 2) / 16, rtol=1e-6)
        penalty = lambda p: adapt_penalty(p, state, l1=0.1, l2=0.01, precision=2.0)
        expected = 0.1 * 18 + 0.005 * 20 + 2 * (1 / 8 + 1 / 2)
        np.testing.assert_allclose(penalty(params), expected, rtol=1e-6)
        gradient = jax.grad(penalty)(params)["a"]
        np.testing.assert_allclose(gradient, [[0.11, 0, -0.12, 0]], rtol=1e-6)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="params must have a leaf with two axes or more"):
            adapt_precision_init({"bias": jnp.ones(3)})
        with pytest.raises(ValueError, match="word_length must be in"):
            adapt_precision_init(grid_params(), word_length=40)
        state = adapt_precision_init(grid_params())
        wrong = {"w": jnp.ones((5, 5))}
        with pytest.raises(ValueError, match="params must have the layers of the state"):
            adapt_precision_update(state, wrong, wrong, 1.0, KEY)
        with pytest.raises(ValueError, match="params must have the state's 2 layers, got 1"):
            adapt_quantize(wrong, state, key=KEY)
        with pytest.raises(ValueError, match="min_lookback must be in"):
            adapt_precision_update(state, grid_params(), grid_params(), 1.0, KEY, min_lookback=101)
        optimizer = adapt(optax.sgd(0.1), key=KEY)
        with pytest.raises(ValueError, match="params must be passed to update"):
            optimizer.update(grid_params(), optimizer.init(grid_params()), value=1.0)


class TestAdapt:
    def test_gradients_are_rounded_and_normalized(self):
        params = {"w": jnp.ones((1, 3))}
        optimizer = adapt(optax.sgd(1.0), key=KEY)
        gradients = {"w": jnp.array([[0.01, 2.0, -0.02]])}
        updates, state = optimizer.update(gradients, optimizer.init(params), params, value=1.0)
        steps = np.asarray(updates["w"] / updates["w"][0, 1] * 32)
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
        np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 1.0, rtol=1e-5)
        assert not jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(KEY))
        exact = adapt(optax.sgd(1.0), key=KEY, quantize_gradients=False)
        updates, _ = exact.update(gradients, exact.init(params), params, value=1.0)
        np.testing.assert_allclose(updates["w"], -gradients["w"] / 2.000125, rtol=1e-4)
        zero = jax.tree.map(jnp.zeros_like, params)
        updates, _ = exact.update(zero, exact.init(params), params, value=1.0)
        np.testing.assert_array_equal(updates["w"], 0.0)

    @pytest.mark.claim("adapt-adaptive-precision-training")
    def test_an_mlp_learns_in_short_words_what_it_learns_in_floats(self):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(256, 4)), jnp.float32)
        labels = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
        init = {
            "a": {"kernel": rng.normal(size=(4, 16)) / 2, "bias": rng.normal(size=16) / 2},
            "b": {"kernel": rng.normal(size=(16, 2)) / 4, "bias": np.zeros(2)},
        }
        init = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), init)

        def logits(params):
            hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
            return hidden @ params["b"]["kernel"] + params["b"]["bias"]

        def cross_entropy(params):
            return optax.losses.softmax_cross_entropy_with_integer_labels(
                logits(params), labels
            ).mean()

        def accuracy(params):
            return jnp.mean(jnp.argmax(logits(params), axis=-1) == labels)

        @jax.jit
        def train(params):
            inner = optax.sgd(optax.cosine_decay_schedule(0.1, 200), momentum=0.9)
            optimizer = adapt(inner, key=KEY, lookback=5, min_lookback=5, max_lookback=20)

            def step(carry, i):
                params, state = carry

                def loss(params):
                    quantized = adapt_quantize(
                        params, state.precision, key=jax.random.fold_in(KEY, i)
                    )
                    return cross_entropy(quantized) + adapt_penalty(quantized, state.precision)

                value, gradients = jax.value_and_grad(loss)(params)
                updates, state = optimizer.update(gradients, state, params, value=value)
                words = state.precision.word_length
                return (optax.apply_updates(params, updates), state), words

            (params, state), words = jax.lax.scan(
                step, (params, optimizer.init(params)), jnp.arange(200)
            )
            return adapt_quantize(params, state.precision, key=KEY), state.precision, words

        @jax.jit
        def train_in_floats(params):
            optimizer = optax.chain(
                optax.normalize_by_update_norm(),
                optax.sgd(optax.cosine_decay_schedule(0.1, 200), momentum=0.9),
            )

            def step(carry, _):
                params, state = carry
                updates, state = optimizer.update(jax.grad(cross_entropy)(params), state)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]

        quantized, precision, words = train(init)
        floats = accuracy(train_in_floats(init))
        assert accuracy(init) < 0.7
        assert floats > 0.9
        assert accuracy(quantized) > floats - 0.02
        assert words.min() == 8
        assert words.mean() < 24
        assert adapt_cost(quantized, precision) < 0.9
