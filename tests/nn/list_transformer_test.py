from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.nn import FeatureTransformer, ListTransformer

RELEASE = np.load(Path(__file__).parents[1] / "oracles" / "ranking.npz")
SIZES = {"categories": (3, 2), "num_numerical": 4, "features": 8, "num_layers": 1, "num_heads": 2}


def new_model(**options):
    rngs = nnx.Rngs(0)
    sizes = {"features": 8, "num_layers": 1, "num_heads": 2, "mlp_features": 12, "head_features": 6}
    return ListTransformer(FeatureTransformer(**SIZES, rngs=rngs), **sizes, **options, rngs=rngs)


@cache
def compiled_parts():
    return nnx.split(nnx.jit(lambda: new_model(dropout=0.5))())


def small_model():
    """The same new model at each call, without compiling it anew."""
    return nnx.merge(*jax.tree.map(jnp.copy, compiled_parts()))


def release_model():
    """The model with the parameters of the authors', which come one after the other."""
    model, flat = small_model(), [RELEASE["parameters"].astype(np.float32)]

    def take(*shape):
        size = int(np.prod(shape))
        values, flat[0] = flat[0][:size].reshape(shape), flat[0][size:]
        return values

    def take_linear(linear):
        inputs = int(np.prod(linear.in_features))
        linear.kernel[...] = take(linear.kernel.size // inputs, inputs).T.reshape(
            linear.kernel.shape
        )
        if linear.bias is not None:
            linear.bias[...] = take(*linear.bias.shape)

    def take_norm(norm):
        norm.scale[...], norm.bias[...] = take(8), take(8)

    (block,) = model.blocks
    maps = [block.attention.query, block.attention.key, block.attention.value]
    for linear in maps:
        linear.kernel[...] = take(8, 8).T.reshape(8, 2, 4)
    for linear in maps:
        linear.bias[...] = take(2, 4)
    for linear in (block.attention.output, block.mlp.up, block.mlp.down):
        take_linear(linear)
    take_norm(block.attention_norm)
    take_norm(block.mlp_norm)
    take_linear(model.hidden)
    take_linear(model.output)

    embedder = model.embedder
    embedder.class_token[...] = take(1, 8)
    embedder.table.embedding[...] = take(8, 8)[2:7]  # between special tokens and one to spare
    embedder.numerical_scale[...], embedder.numerical_bias[...] = take(4, 8), take(4, 8)
    (block,) = embedder.blocks
    take_norm(block.attention_norm)
    for linear in (block.attention.query, block.attention.key, block.attention.value):
        linear.kernel[...] = take(32, 8).T.reshape(8, 2, 16)
    take_linear(block.attention.output)
    take_norm(block.mlp_norm)
    up, gate = take(32, 8), take(32, 8)
    block.mlp.up.kernel[...], block.mlp.gate.kernel[...] = up.T, gate.T
    block.mlp.up.bias[...], block.mlp.gate.bias[...] = take(32), take(32)
    take_linear(block.mlp.down)
    take_norm(embedder.output_norm)
    take_linear(embedder.output)
    assert flat[0].size == 0
    return model


def padded(name, fill):
    """The rows of the two lists, the shorter one filled up."""
    rows, (first, second) = RELEASE[name], RELEASE["lengths"]
    lists = np.full((2, first, *rows.shape[1:]), fill, rows.dtype)
    lists[0], lists[1, :second] = rows[:first], rows[first:]
    return lists


WHERE = np.arange(5) < RELEASE["lengths"][:, None]


def test_scores_and_gradients_match_the_release_whatever_padding_holds():
    model, categorical = release_model(), padded("categorical", 99)

    @nnx.jit
    def run(model, numerical):
        def loss(numerical):
            scores = model(categorical, numerical, where=WHERE)
            return jnp.sum(scores**2), scores

        (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(numerical)
        return scores, gradient

    scores, gradient = run(model, padded("numerical", np.nan))
    np.testing.assert_allclose(scores[WHERE], RELEASE["model_scores"], rtol=1e-4, atol=1e-5)
    expected = RELEASE["model_grad_numerical"]
    np.testing.assert_allclose(gradient[WHERE], expected, rtol=1e-3, atol=1e-5)
    assert np.all(scores[~WHERE] == 0)
    assert np.all(gradient[~WHERE] == 0)
    logits = nnx.jit(lambda embedder, *rows: embedder.logits(*rows))(
        model.embedder, RELEASE["categorical"], RELEASE["numerical"]
    )
    np.testing.assert_allclose(logits, RELEASE["model_logits"], rtol=1e-4, atol=1e-5)


def test_permuted_members_have_permuted_scores_and_see_each_other():
    model = release_model()
    rng = np.random.default_rng(0)
    categorical = np.stack([rng.integers(3, size=(2, 5)), rng.integers(2, size=(2, 5))], axis=-1)
    numerical = rng.normal(size=(2, 5, 4)).astype(np.float32)
    run = nnx.jit(lambda model, c, x: model(c, x))
    scores, order = run(model, categorical, numerical), rng.permutation(5)
    permuted = run(model, categorical[:, order], numerical[:, order])
    np.testing.assert_allclose(permuted, scores[:, order], rtol=1e-4, atol=1e-6)
    other = numerical.copy()
    other[0, 0] += 1
    moved = run(model, categorical, other)
    assert np.all(moved[0] != scores[0])
    np.testing.assert_array_equal(moved[1], scores[1])


def test_dropout_has_a_key_and_an_absent_list_is_0():
    model = small_model()
    c, x = jnp.zeros((2, 3, 2), int), jnp.ones((2, 3, 4))
    where = np.array([[True, True, True], [False, False, False]])
    run = nnx.jit(lambda model, key: model(c, x, where=where, key=key))
    scores = run(model, None)
    assert np.all(np.isfinite(scores))
    assert np.all(scores[1] == 0)
    np.testing.assert_array_equal(run(model, None), scores)
    first, second = (run(model, jax.random.key(i)) for i in range(2))
    assert np.any(first != second)
    assert np.all(np.isfinite(first))


def test_types_unknown_categories_and_features_of_one_kind():
    c, x = jnp.zeros((1, 3, 2), int), jnp.ones((1, 3, 4))
    half = nnx.eval_shape(lambda: new_model(dtype=jnp.bfloat16)(c, x))
    assert half.dtype == jnp.bfloat16
    embed = small_model().embedder
    rows = nnx.jit(lambda embed, c: embed(c, x[0]))(embed, jnp.array([[2, 1], [0, 2], [-1, 0]]))
    assert np.array_equal(np.isnan(rows).any(-1), [False, True, True])
    assert np.all(np.isnan(rows[1:]))
    one_kind = SIZES | {"categories": ()}
    only = nnx.eval_shape(lambda: FeatureTransformer(**one_kind, rngs=nnx.Rngs(0))(None, x))
    assert only.shape == (1, 3, 8)
    one_kind = SIZES | {"num_numerical": 0}
    only = nnx.eval_shape(lambda: FeatureTransformer(**one_kind, rngs=nnx.Rngs(0))(c, None))
    assert only.shape == (1, 3, 8)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least one feature"):
        FeatureTransformer((), 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="categories must be in"):
        FeatureTransformer((3, 0), 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dropout must be in"):
        new_model(dropout=1.0)
    model = small_model()
    with pytest.raises(ValueError, match=r"numerical must have shape \[..., 4\]"):
        model(jnp.zeros((1, 3, 2), int), jnp.ones((1, 3, 5)))
    with pytest.raises(ValueError, match=r"categorical must have shape \[..., 2\], got None"):
        model(None, jnp.ones((1, 3, 4)))
