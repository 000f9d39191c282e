from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxref.adaptation.knowledge_isolation import (
    ConstrainedUnlearningState,
    adaptive_retain_multiplier,
    causal_tracing,
    constrained_unlearning_init,
    constrained_unlearning_loss,
    layer_filter,
)
from jaxref.losses import softmax_cross_entropy
from jaxref.optimizers import train_only

unlearning_loss = jax.jit(constrained_unlearning_loss)


class TestMultiplier:
    def test_matches_the_formula(self):
        lost = np.concatenate([[-3.0, 0.0, 0.5, 0.9, 1e4], np.linspace(0.01, 1.2, 40)])
        expected = [
            min(max(round(0.3 * 6.0 ** min(d, 50) + 0.8, 1), 1.2), 2.3) if d > 0 else 1.2
            for d in lost
        ]
        found = jax.jit(adaptive_retain_multiplier)(np.float32(lost + 2), np.float32(2))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(found[2:4], [1.5, 2.3], rtol=1e-6)
        assert adaptive_retain_multiplier(jnp.bfloat16(3), jnp.float32(2)).dtype == jnp.bfloat16

    def test_bad_input(self):
        one = np.ones(2, "f")
        with pytest.raises(ValueError, match=r"maximum_above_base must be in \[0, inf\), got -1.0"):
            adaptive_retain_multiplier(one, one, base=2.0, maximum=1.0)
        with pytest.raises(ValueError, match="reference_loss must broadcast to shape"):
            adaptive_retain_multiplier(one, np.ones(3, "f"))
        with pytest.raises(TypeError, match="retain_loss must have a floating-point type"):
            adaptive_retain_multiplier(np.ones(2, int), one)


class TestLoss:
    def test_follows_the_epochs(self):
        rng = np.random.default_rng(0)
        state = constrained_unlearning_init()
        step_of = jax.jit(
            jax.value_and_grad(constrained_unlearning_loss, argnums=(0, 1), has_aux=True)
        )
        recorded = []
        for step, epoch in enumerate((0, 0, 0, 1, 1, 2)):
            forget, retain = rng.exponential(size=(2, 3, 4)).astype("f")
            retain += 0.3 * step
            masks = rng.uniform(size=(2, 3, 4)) < (0.7 if step != 1 else 0.0)
            (loss, state), slopes = step_of(
                forget, retain, state, epoch=epoch, forget_where=masks[0], retain_where=masks[1]
            )
            if step == 1:  # a batch without tokens
                assert loss == 0
                assert not np.any(slopes)
                continue
            means = [x[m].mean() for x, m in zip((forget, retain), masks)]
            if epoch == 0:
                recorded.append(means[1])
                multiplier = 1.2
            else:
                lost = means[1] - np.mean(recorded)
                grown = round(0.3 * 6**lost + 0.8, 1) if lost > 0 else 0
                multiplier = min(max(grown, 1.2), 2.3)
            np.testing.assert_allclose(loss, multiplier * means[1] - means[0], rtol=1e-5)
            np.testing.assert_allclose(slopes[0], masks[0] / -masks[0].sum(), rtol=1e-5)
            np.testing.assert_allclose(slopes[1], multiplier * masks[1] / masks[1].sum(), rtol=1e-5)
        assert multiplier > 1.2
        assert state.retain_count == 2
        np.testing.assert_allclose(state.retain_sum, np.sum(recorded), rtol=1e-6)

    def test_edges(self):
        big = np.full((2, 2), 1e4, "f")
        loss, state = unlearning_loss(big, big, constrained_unlearning_init(), epoch=3)
        np.testing.assert_allclose(loss, 0.2e4, rtol=1e-5)  # nothing was recorded: the base
        assert state.retain_count == 0
        half, _ = unlearning_loss(big.astype(jnp.bfloat16), 0 * big, state, epoch=0)
        assert half.dtype == jnp.bfloat16
        with pytest.raises(ValueError, match="forget_where must broadcast to shape"):
            constrained_unlearning_loss(big, big, state, epoch=0, forget_where=np.ones(3, bool))
        with pytest.raises(TypeError, match="retain_nll must have a floating-point type"):
            constrained_unlearning_loss(big, big.astype(int), state, epoch=0)

    def test_a_batch_may_be_spread_over_devices(self):
        rng = np.random.default_rng(1)
        forget, retain = rng.exponential(size=(2, 16, 3)).astype("f")
        where = rng.uniform(size=(16, 3)) < 0.6
        state = ConstrainedUnlearningState(jnp.float32(0.4), jnp.int32(2))
        loss = lambda f, r, m, axis_name=None: constrained_unlearning_loss(
            f, r, state, epoch=1, forget_where=m, retain_where=m, axis_name=axis_name
        )
        rows = PartitionSpec("data")
        spread = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=Mesh(np.array(jax.devices()), "data"),
            in_specs=rows,
            out_specs=PartitionSpec(),
        )
        ours, plain = jax.jit(spread)(forget, retain, where), jax.jit(loss)(forget, retain, where)
        np.testing.assert_allclose(jax.tree.leaves(ours), jax.tree.leaves(plain), rtol=1e-5)


class TestFilter:
    def test_names(self):
        tree = {
            "blocks": [{"mlp": {"up": 0.0}, "norm": 0.0} for _ in range(3)],
            "layers_1": {"mlp": 0.0},
            "model.layers.11.mlp.down_proj.weight": 0.0,
            "mlp": {"1": 0.0},
        }
        mask = layer_filter(tree, [1, 11])
        assert [block["mlp"]["up"] for block in mask["blocks"]] == [False, True, False]
        assert mask["layers_1"]["mlp"]
        assert mask["model.layers.11.mlp.down_proj.weight"]
        assert sum(jax.tree.leaves(mask)) == 3
        assert sum(jax.tree.leaves(layer_filter(tree, [0, 2], "norm"))) == 2

    def test_bad_input(self):
        tree = {"blocks": [{"mlp": 0.0}] * 2}
        for layers, module in (([], "mlp"), ([0, 2], "mlp"), ([0], "attention")):
            with pytest.raises(ValueError, match="layers must be of those with a module"):
                layer_filter(tree, layers, module)


def mixing_network(params, x, edit):
    """Three layers that mix positions, and a readout at the last."""
    for layer, (mix, w) in enumerate(params["layers"]):
        x = edit(layer, x + jnp.tanh(jnp.einsum("ts,bsf->btf", mix, x) @ w))
    return x[:, -1] @ params["head"]


class TestTracing:
    def test_matches_one_run_after_the_other(self):
        rng = np.random.default_rng(2)
        layers = [
            (np.tril(rng.normal(size=(3, 3))).astype("f"), rng.normal(size=(4, 4)).astype("f"))
            for _ in range(3)
        ]
        params = {"layers": layers, "head": rng.normal(size=(4, 5)).astype("f")}
        x = rng.normal(size=(2, 3, 4)).astype("f")
        subject = np.array([[True, True, False], [False, True, False]])
        target, key, draws, window = np.array([1, 4]), jax.random.key(3), 3, 2
        trace = jax.jit(partial(causal_tracing, mixing_network, draws=draws, window=window))(
            params, x, subject, target, key=key, noise_scale=0.5
        )

        def run(x, restored=(), clean=None):
            states = []
            for layer, (mix, w) in enumerate(layers):
                x = x + np.tanh(mix.astype(np.float64) @ x @ w)
                for at, position in restored:
                    if at == layer:
                        x[position] = clean[layer][position]
                states.append(x.copy())
            e = np.exp(x[-1] @ params["head"])
            return e / e.sum(), states

        noise = np.asarray(jax.random.normal(key, (draws, *x.shape)))
        for i in range(2):
            clean, states = run(x[i].astype(np.float64))
            np.testing.assert_allclose(trace.clean_probability[i], clean[target[i]], rtol=1e-4)
            inputs = x[i] + 0.5 * x[subject].std() * noise[:, i] * subject[i][:, None]
            low = np.mean([run(z)[0][target[i]] for z in inputs])
            np.testing.assert_allclose(trace.corrupted_probability[i], low, rtol=1e-4)
            for layer, position in np.ndindex(3, 3):
                # a window of two is the layer before and the layer itself
                restored = [(at, position) for at in (layer - 1, layer)]
                high = np.mean([run(z, restored, states)[0][target[i]] for z in inputs])
                effect = trace.indirect_effect[i, layer, position]
                np.testing.assert_allclose(effect, high - low, atol=2e-5)

    def test_bad_input(self):
        params = {"layers": [], "head": np.ones((4, 5), "f")}
        x, key = np.zeros((2, 3, 4), "f"), jax.random.key(0)
        good = (mixing_network, params, x, np.ones(3, bool), np.zeros(2, int))
        twice = lambda params, x, edit: edit(0, edit(0, x))[:, -1]
        for change, options, error, message in (
            ({}, {}, ValueError, "apply_fn must pass the state of each layer through edit"),
            ({0: twice}, {}, ValueError, "apply_fn must call edit once for each layer, in order"),
            ({2: x[0]}, {}, ValueError, r"embeddings must have shape \[prompts, length, features"),
            ({3: np.ones(4, bool)}, {}, ValueError, "subject must broadcast to shape"),
            ({4: np.zeros(3, int)}, {}, ValueError, r"target must have shape \(2,\)"),
            ({4: np.zeros(2)}, {}, TypeError, "target must be integers"),
            ({}, {"noise_scale": -1.0}, ValueError, "noise_scale must be in"),
            ({}, {"window": 0}, ValueError, "window must be in"),
        ):
            arguments = [change.get(i, value) for i, value in enumerate(good)]
            with pytest.raises(error, match=message):
                causal_tracing(*arguments, key=key, **options)


def values_of(params, keys, edit=lambda layer, state: state):
    x = params["embed"][keys]
    for layer, block in enumerate(params["blocks"]):
        x = x + edit(layer, jax.nn.gelu(x @ block["mlp"]["up"]) @ block["mlp"]["down"])
    return x @ params["head"]


def three_blocks(key):
    keys = iter(jax.random.split(key, 8))
    normal = lambda scale, *shape: scale * jax.random.normal(next(keys), shape)
    return {
        "embed": normal(1.0, 32, 24),
        "blocks": [
            {"mlp": {"up": normal(0.2, 24, 48), "down": normal(0.15, 48, 24)}} for _ in range(3)
        ],
        "head": normal(0.2, 24, 16),
    }


class TestClaims:
    def test_the_layer_that_looks_a_subject_up_is_found(self):
        """Of three modules the second alone copies the subject to where the last token reads it:
        its state at the subject is all that matters."""

        def apply_fn(params, x, edit):
            answer = jnp.zeros_like(x)
            for layer in range(3):
                answer += edit(layer, x if layer == 1 else 0 * x)
            return 30 * answer[:, 1]

        subject, target = np.array([False, True, False, False]), np.array([2, 4])
        x = np.zeros((2, 4, 5), "f")
        x[[0, 1], 1, target] = 1
        trace = jax.jit(partial(causal_tracing, apply_fn, None, draws=200))
        found = trace(x, subject, target, key=jax.random.key(0))
        expected = np.zeros((2, 3, 4))
        expected[:, 1, 1] = 1 - found.corrupted_probability
        np.testing.assert_allclose(found.indirect_effect, expected, atol=1e-5)
        assert np.all(found.corrupted_probability < 0.5)
        np.testing.assert_allclose(found.clean_probability, 1, rtol=1e-5)
        still = trace(x, subject, target, key=jax.random.key(0), noise_scale=0.0)
        np.testing.assert_allclose(still.indirect_effect, 0, atol=1e-6)

    @pytest.mark.claim("constrained-unlearning-knowledge-isolation")
    def test_what_is_retained_is_spared_while_the_rest_is_forgotten_in_two_layers(self):
        """A network that knows the values of 32 keys by heart forgets half of them in the MLPs of
        its first two layers. When they are forgotten the others are still known; ascent that goes
        on harms these much more if the weight of retaining does not grow. Nothing else moves,
        whatever momentum and weight decay the optimizer has."""
        keys = np.arange(32)

        def losses(params, values):
            return softmax_cross_entropy(values_of(params, keys), values)

        @jax.jit
        @jax.vmap
        def experiment(key):
            params, adam = three_blocks(key), optax.adam(3e-3)
            values = jax.random.randint(key, (32,), 0, 16)

            def learn(_, carry):
                params, state = carry
                gradient = jax.grad(lambda p: losses(p, values).mean())(params)
                updates, state = adam.update(gradient, state)
                return optax.apply_updates(params, updates), state

            learned, _ = jax.lax.fori_loop(0, 150, learn, (params, adam.init(params)))
            optimizer = train_only(optax.adamw(3e-3), layer_filter(learned, range(2)))

            @jax.vmap
            def unlearn(base, maximum):
                def step(carry, i):
                    params, state, first = carry

                    def loss(params):
                        nll = losses(params, values)
                        value, new = constrained_unlearning_loss(
                            nll[:16], nll[16:], first, epoch=i // 5, base=base, maximum=maximum
                        )
                        return value, (new, nll.reshape(2, 16).mean(axis=1))

                    gradient, (first, means) = jax.grad(loss, has_aux=True)(params)
                    updates, state = optimizer.update(gradient, state, params)
                    return (optax.apply_updates(params, updates), state, first), means

                start = (learned, optimizer.init(learned), constrained_unlearning_init())
                (params, *_), means = jax.lax.scan(step, start, np.arange(60))
                return params, means

            return learned, *unlearn(np.array([1.2, 1.0]), np.array([2.3, 1.0]))

        learned, params, means = experiment(jax.random.split(jax.random.key(0), 3))
        for adaptive, fixed in np.asarray(means):
            forgotten = np.argmax(adaptive[:, 0] > 3)
            assert forgotten > 0
            assert adaptive[forgotten, 1] < adaptive[0, 1] + 0.2
            assert adaptive[-1, 0] > 100
            assert adaptive[-1, 1] < 0.6 * fixed[-1, 1]
        moved = jax.tree.map(lambda new, old: np.any(new != old[:, None]), params, learned)
        assert jax.tree.leaves(moved["blocks"][:2]) == [True] * 4
        assert not any(jax.tree.leaves([moved["blocks"][2], moved["embed"], moved["head"]]))
