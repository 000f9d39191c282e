import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.losses import load_balance_loss
from jaxref.models import WideNetConfig, WideNetEncoder
from jaxref.nn import top_k_router

SIZES = {"features": 8, "num_layers": 2, "num_heads": 2, "mlp_features": 12}


def make_encoder(make_module, seed=0, **options):
    return make_module(lambda: WideNetEncoder(**(SIZES | options), rngs=nnx.Rngs(0)), seed)


def random_tokens(shape=(3, 5, 8)):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def float64(module):
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    )


def encoder64(params, x, *, num_layers, top_k):
    """Evaluation in float64, token by token: no expert's room is limited, nothing is random."""
    x = np.asarray(x, np.float64)

    def normed(p, x):
        centred = x - x.mean(-1, keepdims=True)
        return (
            p["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) + p["bias"]
        )

    def attended(p, x):
        y = p["output"]["bias"]
        for head in range(p["query"]["kernel"].shape[1]):
            query, key, value = (
                x @ p[n]["kernel"][:, head] + p[n]["bias"][head] for n in ("query", "key", "value")
            )
            weights = np.exp(query @ key.T / math.sqrt(key.shape[-1]))
            weights /= weights.sum(-1, keepdims=True)
            y = y + weights @ value @ p["output"]["kernel"][head]
        return y

    def mixed(p, token):
        scores = np.exp(token @ p["router"]["kernel"])
        gates = scores / scores.sum()
        y = 0
        for expert in np.argsort(-gates)[:top_k]:
            hidden = token @ p["up"]["kernel"][expert] + p["up"]["bias"][expert]
            hidden = (
                hidden / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
            )
            y += gates[expert] * (hidden @ p["down"]["kernel"][expert] + p["down"]["bias"][expert])
        return y

    for layer in range(num_layers):
        rows = []
        for tokens in x:
            tokens = tokens + attended(
                params["attention"], normed(params["attention_norms"][layer], tokens)
            )
            y = normed(params["moe_norms"][layer], tokens)
            rows.append(tokens + np.stack([mixed(params["moe"], token) for token in y]))
        x = np.stack(rows)
    return x


class TestNumbers:
    @pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (1, 1)])
    def test_evaluation_matches_float64(self, num_experts, top_k, make_module, quick_apply):
        """With one expert and gate 1 that is a dense feed-forward network."""
        encoder = make_encoder(make_module, num_experts=num_experts, top_k=top_k)
        encoder.eval()
        x = random_tokens()
        ours = quick_apply(lambda encoder, x: encoder(x), encoder, x)
        expected = encoder64(float64(encoder), x, num_layers=2, top_k=top_k)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    def test_with_room_for_all_training_is_evaluation_and_owes_the_mean_balance_loss(
        self, make_module, quick_apply
    ):
        encoder = make_encoder(make_module, capacity_factor=2.0, balance_coefficient=0.5)
        x = random_tokens()

        def training(encoder, x):
            encoder.train()
            return encoder(x), encoder.moe.auxiliary_loss[...]

        def by_hand(encoder, x):
            encoder.eval()
            losses = []
            for first, second in zip(encoder.attention_norms, encoder.moe_norms):
                x = x + encoder.attention(first(x))
                y = second(x)
                routed = top_k_router(encoder.moe.router(y.reshape(-1, 8)), 2)
                losses.append(load_balance_loss(routed.probabilities, routed.assignment))
                x = x + encoder.moe(y)
            return x, 0.5 * sum(losses) / 2, encoder.moe.auxiliary_loss[...]

        y, owed = quick_apply(training, encoder, x)
        expected, mean, untouched = quick_apply(by_hand, encoder, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(owed, mean, rtol=1e-5)
        assert untouched == encoder.moe.auxiliary_loss[...]
        assert owed > 0.49  # 0.5 where all experts are equally busy

    def test_tokens_out_of_sight_change_no_other(self, make_module, quick_apply):
        encoder = make_encoder(make_module)
        encoder.eval()
        x = random_tokens((1, 5, 8))
        changed = x.copy()
        changed[:, 3] += 1
        where = np.arange(5)[None] != 3
        run = partial(quick_apply, lambda encoder, x: encoder(x, where=where), encoder)
        before, after = run(x), run(changed)
        np.testing.assert_allclose(before[:, where[0]], after[:, where[0]], atol=1e-6)

    def test_number_of_parameters(self, count_parameters):
        """Of the paper's sizes, whose 63 and 40 million are WideNet-H and -L."""
        sizes = {
            (32, 1280, 16, 5120): 63e6,
            (24, 1024, 16, 4096): 40e6,
        }
        for (layers, features, heads, hidden), paper in sizes.items():
            config = WideNetConfig(
                num_classes=1000,
                num_layers=layers,
                features=features,
                num_heads=heads,
                mlp_features=hidden,
            )
            count = count_parameters(lambda config=config: config.build(rngs=nnx.Rngs(0)))
            assert abs(count / paper - 1) < 0.03


class TestClaims:
    @pytest.mark.claim("widenet")
    def test_depth_costs_norms_alone_and_they_make_the_blocks_differ(
        self, make_module, quick_apply, count_parameters
    ):
        build = lambda layers: (
            lambda: WideNetEncoder(**(SIZES | {"num_layers": layers}), rngs=nnx.Rngs(0))
        )
        one, two, seven = (count_parameters(build(layers)) for layers in (1, 2, 7))
        assert two - one == 4 * 8  # two norms with gain and bias
        assert seven - one == 6 * (two - one)
        encoder = make_encoder(make_module, num_layers=2)
        encoder.eval()
        x = random_tokens((64, 1, 8))

        def routes(encoder, x):
            choice = []
            for first, second in zip(encoder.attention_norms, encoder.moe_norms):
                y = second(x + encoder.attention(first(x)))  # of the same stream
                logits = encoder.moe.router(y.reshape(-1, 8))
                choice.append(top_k_router(logits, 2).assignment[:, 0])
            return jnp.stack(choice)

        individual = quick_apply(routes, encoder, x)
        for norms in (encoder.attention_norms, encoder.moe_norms):
            for name in ("scale", "bias"):
                getattr(norms[1], name)[...] = getattr(norms[0], name)[...]
        shared = quick_apply(routes, encoder, x)
        assert np.mean(individual[0] != individual[1]) > 0.05
        assert np.all(shared[0] == shared[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, r"top_k must be in \[1, 4\], got 5"),
        ({"num_heads": 3}, "num_heads must divide features = 8"),
        ({"patch_size": 3}, "patch_size must divide"),
        ({"num_layers": 0}, "num_layers must be in"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"capacity_factor": 0.0}, "capacity_factor must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    given = {"num_classes": 3, "image_shape": (8, 8, 3), "patch_size": 4} | SIZES | change
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: WideNetConfig(**given).build(rngs=nnx.Rngs(0)))
