from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from jaxref import losses
from jaxref.nn import (
    MLP,
    IntegratorParam,
    LoRALinear,
    MultiHeadAttention,
    XCrossEncoder,
    count_parameters,
    cross_model_integrate,
    stack_adapters,
)

RNG = np.random.default_rng(0)
H = RNG.normal(size=(3, 2, 4, 5)).astype("f")
WEIGHT, BIAS = RNG.normal(size=(15, 9)).astype("f"), RNG.normal(size=9).astype("f")


integrate = jax.jit(cross_model_integrate, static_argnames="per_token")
MASK = np.broadcast_to(np.tri(4, dtype=bool) & (np.arange(4) < 3), (2, 1, 4, 4))


class Layer(nnx.Module):
    """A transformer layer of maps with adapters."""

    def __init__(self, rngs):
        linear = partial(LoRALinear, rank=2, alpha=3.0)
        self.attention = MultiHeadAttention(8, 2, linear=linear, rngs=rngs)
        self.mlp = MLP(8, 12, linear=linear, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.attention(x, mask=mask)
        return x + self.mlp(x)


@pytest.fixture(scope="module")
def models():
    """Three models of two layers, with the same base and adapters of their own."""
    make = lambda: nnx.List([Layer(nnx.Rngs(0)), Layer(nnx.Rngs(1))])
    graph, *states = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)

    def drawn(state, seed):
        rng = np.random.default_rng(seed)
        draw = lambda v: np.asarray(0.4 * rng.normal(size=v.shape), v.dtype)
        return jax.tree.map(draw, state)

    return [nnx.merge(graph, drawn(states[0], 1 + m), drawn(states[1], 0)) for m in range(3)]


@pytest.fixture(scope="module")
def encoder(models):
    layers = [stack_adapters([m[i] for m in models]) for i in range(2)]
    return XCrossEncoder(layers, 8, num_streams=3, rngs=nnx.Rngs(5))


apply = nnx.jit(lambda module, x: module(x))


@nnx.jit
def streams_and_scores(encoder, x, where):
    return encoder.streams(x, mask=MASK), encoder(x, where=where, mask=MASK)


class TestIntegrate:
    @pytest.mark.parametrize("per_token", [True, False])
    def test_matches_the_formula(self, per_token):
        def literal(h, w, b):
            refined = np.array(h, np.float64)
            for i, t in np.ndindex(2, 4):
                seen = h[:, i, t if per_token else 0].reshape(-1)
                z = (seen @ w + b).reshape(3, 3)
                refined[:, i, t] += z @ h[:, i, t]
            return refined

        refine = lambda h, w, b: integrate(h, w, bias=b, per_token=per_token)
        value, vjp = jax.vjp(refine, H, WEIGHT, BIAS)
        wide = [np.float64(v) for v in (H, WEIGHT, BIAS)]
        np.testing.assert_allclose(value, literal(*wide), rtol=1e-4, atol=1e-5)
        cotangent = RNG.normal(size=H.shape).astype("f")
        slopes = vjp(cotangent)
        for k, index in ((0, (1, 0, 2, 3)), (0, (2, 1, 0, 0)), (1, (7, 4)), (2, (5,))):
            ends = []
            for sign in (1, -1):
                moved = [v.copy() for v in wide]
                moved[k][index] += sign * 1e-5
                ends.append(np.sum(cotangent * literal(*moved)))
            np.testing.assert_allclose(slopes[k][index], (ends[0] - ends[1]) / 2e-5, rtol=1e-3)

    def test_one_model_is_scaled(self):
        w = WEIGHT[:5, :1]
        ours = integrate(H[:1], w)
        np.testing.assert_allclose(ours, H[:1] * (1 + H[:1] @ w), rtol=1e-4, atol=1e-5)

    def test_half_precision_and_bad_input(self):
        half = jnp.asarray(H, jnp.bfloat16)
        ours = integrate(half, WEIGHT)
        assert ours.dtype == jnp.bfloat16
        expected = integrate(half.astype("f"), WEIGHT)
        np.testing.assert_allclose(np.float32(ours), expected, rtol=1e-2, atol=1e-2)
        with pytest.raises(ValueError, match=r"weight must have shape \(10, 4\)"):
            cross_model_integrate(H[:2], WEIGHT)
        with pytest.raises(ValueError, match=r"bias must have shape \(9,\)"):
            cross_model_integrate(H, WEIGHT, bias=BIAS[:3])
        with pytest.raises(ValueError, match="hidden_states must have shape"):
            cross_model_integrate(H[0, 0], WEIGHT)
        with pytest.raises(TypeError, match="hidden_states must have a floating-point type"):
            cross_model_integrate(np.ones((3, 2, 5), int), WEIGHT)


class TestLoRALinear:
    def test_matches_the_formula(self):
        adapted = LoRALinear(
            4, (2, 3), 2, alpha=6.0, num_adapters=2, use_bias=True, axes=(None,) * 3,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        x = RNG.normal(size=(6, 4)).astype("f")
        kernel = np.asarray(adapted.kernel[...]).reshape(4, 6)
        ours = apply(adapted, x.reshape(2, 3, 4)).reshape(6, 6)
        np.testing.assert_allclose(ours, x @ kernel, rtol=1e-4, atol=1e-6)
        adapted.up[...] = RNG.normal(size=(2, 2, 6))
        expected = [
            part @ (kernel + 3 * np.asarray(adapted.down[m]) @ np.asarray(adapted.up[m]))
            for m, part in enumerate((x[:3], x[3:]))
        ]
        ours = apply(adapted, x.reshape(2, 3, 4)).reshape(6, 6)
        np.testing.assert_allclose(ours, np.concatenate(expected), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="x must have rows in 2 equal parts, got 5"):
            adapted(x[:5])
        with pytest.raises(ValueError, match="not one with 2 adapters"):
            adapted.effective_kernel()
        with pytest.raises(ValueError, match="rank must be in"):
            LoRALinear(4, 3, 0, axes=(None, None), rngs=nnx.Rngs(0))

    def test_effective_kernel_and_half_precision(self):
        one = LoRALinear(4, 3, 2, axes=("embed", "mlp"), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        one.up[...] = RNG.normal(size=(1, 2, 3))
        x = RNG.normal(size=(5, 4)).astype("f")
        ours, kernel = apply(one, x), np.float32(one.effective_kernel())
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ours), x @ kernel, atol=0.05)
        assert one.down.get_metadata()["axes"] == (None, "embed", None)


class TestStackAdapters:
    def test_other_bases_and_shapes_are_refused(self):
        make = lambda seed, rank=2: LoRALinear(4, 3, rank, axes=(None, None), rngs=nnx.Rngs(seed))
        with pytest.raises(ValueError, match="the same parameters but for their adapters"):
            stack_adapters([make(0), make(1)])
        with pytest.raises(ValueError, match="the same structure and shapes"):
            stack_adapters([make(0), make(0, 3)])
        with pytest.raises(ValueError, match="at least one module"):
            stack_adapters([])


class TestClaims:
    @pytest.mark.claim("x-cross")
    def test_a_signed_mix_of_frozen_models_is_learned_from_few_tokens(self, models, encoder):
        """At first every stream is its own model, which integrators of 0 leave to the bit;
        gradients reach integrators and head alone; and a mix whose signs depend on the token is
        fitted from 40 tokens, which no fixed mix of the models comes near."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 4, 8)).astype("f")
        where = np.ones((2, 4), bool)
        streams, _ = streams_and_scores(encoder, x, where)
        alone = nnx.jit(lambda model: model[1](model[0](x, mask=MASK), mask=MASK))
        for stream, model in zip(streams, models):
            np.testing.assert_allclose(stream, alone(model), rtol=1e-4, atol=1e-4)
        untouched = integrate(streams, np.zeros((24, 9), "f"), bias=np.zeros(9, "f"))
        np.testing.assert_array_equal(untouched, streams)

        score = lambda encoder: jnp.sum(encoder(x) ** 2)
        grad = nnx.jit(nnx.grad(score))(encoder)
        frozen = jax.tree.leaves(grad["layers"])
        assert frozen
        assert all(not np.any(leaf) for leaf in frozen)
        assert all(np.any(leaf) for leaf in jax.tree.leaves((grad["weights"], grad["head"])))

        sources = rng.normal(size=(2, 240, 6)).astype("f")
        mixed = rng.normal(size=(12, 2)).astype("f")
        signs = np.concatenate(sources, -1) @ mixed
        target = (1 + signs[:, :1]) * sources[0] + signs[:, 1:] * sources[1]
        few, rest = slice(0, 40), slice(40, 240)

        @jax.jit
        def fit(seen, target):
            error = lambda w: jnp.mean((cross_model_integrate(seen, w)[0] - target) ** 2)
            step = lambda w, _: (w - 0.1 * jax.grad(error)(w), None)
            return jax.lax.scan(step, jnp.zeros((12, 4)), length=400)[0]

        w = fit(sources[:, few], target[few])
        ours = np.mean((np.asarray(integrate(sources[:, rest], w)[0]) - target[rest]) ** 2)
        columns = np.stack([s[few].ravel() for s in sources], -1)
        best, *_ = np.linalg.lstsq(columns, target[few].ravel())
        fixed = np.mean(
            (best[0] * sources[0, rest] + best[1] * sources[1, rest] - target[rest]) ** 2
        )
        assert ours < 0.01 * fixed

    def test_streams_move_with_the_blocks_of_the_weights(self):
        order = np.array([2, 0, 1])
        w = WEIGHT.reshape(3, 5, 3, 3)[order][:, :, order][:, :, :, order].reshape(15, 9)
        b = BIAS.reshape(3, 3)[order][:, order].reshape(9)
        ours = integrate(H[order], w, bias=b)
        expected = integrate(H, WEIGHT, bias=BIAS)[order]
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


class TestEncoder:
    def test_integrated_states_are_what_the_next_layer_sees(self, models, encoder):
        x = RNG.normal(size=(2, 4, 8)).astype("f")
        graph, state = nnx.split(encoder)
        moved = nnx.merge(graph, state)
        for w, b in zip(moved.weights, moved.biases):
            w[...] = 0.1 * RNG.normal(size=w.shape)
            b[...] = 0.1 * RNG.normal(size=b.shape)
        where = np.array([[True, True, True, True], [True, False, False, False]])

        @nnx.jit
        def by_hand(models, weights, biases):
            h = [jnp.asarray(x)] * 3
            for i in range(2):
                h = jnp.stack([model[i](y, mask=MASK) for model, y in zip(models, h)])
                h = cross_model_integrate(h, weights[i][...], bias=biases[i][...])
            return h

        h = np.asarray(by_hand(models, moved.weights, moved.biases))
        streams, scores = streams_and_scores(moved, x, where)
        np.testing.assert_allclose(streams, h, rtol=1e-3, atol=1e-4)
        head = np.asarray(moved.head[...]).reshape(3, 8)
        pooled = np.stack([np.mean(h[:, 0], 1), h[:, 1, 0]], 1)
        expected = np.einsum("nbd,nd->b", pooled, head)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
        moved.pooling = "first"
        _, scores = streams_and_scores(moved, x, where)
        expected = np.einsum("nbd,nd->b", h[:, :, 0], head)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)

    def test_numbers_of_parameters(self, encoder):
        assert count_parameters(encoder, IntegratorParam) == 2 * (27 * 8 + 9) + 3 * 8 + 1
        adapters = count_parameters(encoder, nnx.LoRAParam)
        assert adapters == 3 * 2 * 2 * (4 * 16 + 2 * 20)

    def test_bad_input_is_named(self):
        make = partial(XCrossEncoder, features=8, num_streams=2, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="layers must have at least one layer"):
            make([])
        with pytest.raises(ValueError, match="pooling must be 'mean' or 'first'"):
            make([lambda x: x], pooling="max")
        with pytest.raises(ValueError, match="num_streams must be in"):
            make([lambda x: x], num_streams=0)


FEATURES = 16


class Reader(nnx.Module):
    """Two layers of maps with adapters, token by token, and a score of the mean of the tokens."""

    def __init__(self, rngs):
        linear = partial(LoRALinear, rank=8)
        self.layers = nnx.List([MLP(FEATURES, 32, linear=linear, rngs=rngs) for _ in range(2)])
        self.head = nnx.Param(jnp.zeros(FEATURES))

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.mean(1) @ self.head[...]


class Residual(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return x + self.layer(x)


@cache
def digits():
    """The first 15 principal components of digits `[1797, 15]`, shuffled, and their labels."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    pixels = data.data[order] - data.data[order[:1200]].mean(0)
    components = pixels @ np.linalg.svd(pixels[:1200], full_matrices=False)[2][: FEATURES - 1].T
    return (components / components[:1200].std()).astype("f"), data.target[order]


def candidates(key, users, tastes, domain, first, last):
    """Prompts `[users * 5, 3, features]` of each user's candidates, and which is the one chosen.

    A candidate is three digits, each with a mark of 5 or -5 beside its principal components. In
    domains 0 and 1 it is worth the sum of its digits by one of two tables of tastes `[2, 10]`; in
    the new domain 2 by the first table for digits with one mark, and for the others by the second,
    with the other sign.
    """
    components, labels = map(jnp.asarray, digits())
    keys = jax.random.split(key)
    chosen = jax.random.randint(keys[0], (users, 5, 3), first, last)
    mark = jax.random.rademacher(keys[1], chosen.shape, jnp.float32)
    first_taste, second_taste = tastes[:, labels[chosen]]
    mixed = jnp.where(mark > 0, first_taste, -second_taste)
    worth = jnp.stack([first_taste, second_taste, mixed])[domain]
    prompts = jnp.concatenate([components[chosen], 5 * mark[..., None]], axis=-1)
    return prompts.reshape(users * 5, 3, FEATURES), jnp.argmax(worth.sum(-1), axis=-1)


def trained(model, kind, batch_of, rate, keys):
    """The model after one step of Adam a key on its parameters of a kind."""
    graph, start, rest = nnx.split(model, kind, ...)
    optimizer = optax.adam(rate)

    def objective(params, key):
        prompts, chosen = batch_of(key)
        scores = nnx.merge(graph, params, rest)(prompts).reshape(-1, 5)
        return losses.softmax_cross_entropy(scores, chosen).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), keys)
    return nnx.merge(graph, params, rest)


class TestTraining:
    @pytest.mark.slow
    def test_integrated_models_learn_a_new_domain_from_few_choices(self):
        """Two adapters of one frozen model learn what digits are worth in their domains. In a third
        one, where a mark says which of the two counts, and with which sign, X-Cross learns from the
        choices of 64 users to find more than its head alone does, a fixed mix of both, or than a
        new adapter of the same model, which has five times the parameters."""
        images, unseen = (0, 1200), (1200, 1797)
        head_and = lambda kind: nnx.Any(kind, nnx.PathContains("head"))

        def found(key):
            keys = jax.random.split(key, 8)
            tastes = jax.random.normal(keys[0], (2, 10))
            base = Reader(nnx.Rngs(keys[1]))
            adapters = head_and(nnx.LoRAParam)

            def learned(source):
                domain, key = source
                batch_of = lambda key: candidates(key, 32, tastes, domain, *images)
                keys = jax.random.split(key, 150)
                return nnx.state(trained(base, adapters, batch_of, 0.01, keys))

            states = jax.lax.map(learned, (jnp.arange(2), keys[2:4]))
            graph = nnx.graphdef(base)
            sources = [nnx.merge(graph, jax.tree.map(lambda v: v[i], states)) for i in range(2)]
            layers = [
                Residual(stack_adapters([source.layers[i] for source in sources])) for i in range(2)
            ]
            integrated = XCrossEncoder(layers, FEATURES, num_streams=2, rngs=nnx.Rngs(keys[4]))
            integrated.head[...] = jnp.concatenate([source.head[...] for source in sources]) / 2
            few = candidates(keys[5], 64, tastes, 2, *images)
            prompts, chosen = candidates(keys[6], 400, tastes, 2, *unseen)
            hits = []
            for model, kind, rate in (
                (integrated, IntegratorParam, 0.002),
                (integrated, nnx.PathContains("head"), 0.006),
                (base, adapters, 0.006),
            ):
                steps = jax.random.split(keys[7], 60)
                model = trained(model, kind, lambda _: few, rate, steps)
                scores = model(prompts).reshape(-1, 5)
                hits.append(jnp.mean(jnp.argmax(scores, axis=-1) == chosen))
            return jnp.stack(hits)

        seeds = jax.random.split(jax.random.key(0), 3)
        each = jax.jit(lambda seeds: jax.lax.map(found, seeds))(seeds)
        cross, head, adapter = np.mean(each, axis=0)
        assert cross > head + 0.04
        assert cross > adapter + 0.04
        base = nnx.eval_shape(lambda: Reader(nnx.Rngs(0)))
        layers = [Residual(layer) for layer in base.layers]
        new = count_parameters(
            XCrossEncoder(layers, FEATURES, num_streams=2, rngs=nnx.Rngs(0)), IntegratorParam
        )
        assert new < 0.2 * count_parameters(base, nnx.LoRAParam)
