import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref.models import Transformer, TransformerConfig, with_scan_layers
from jaxref.norms import layer_norm, rms_norm
from jaxref.parallel import logical_sharding, make_mesh, use_rules

SMALL = {
    "vocab_size": 11,
    "max_length": 7,
    "num_layers": 2,
    "features": 8,
    "num_heads": 2,
    "mlp_features": 12,
}
COMBINATIONS = [
    dict(zip(("norm_placement", "positions", "gated", "tie_embeddings", "norm"), values))
    for values in itertools.product(
        ("pre", "post", "peri"),
        ("rotary", "learned", None),
        (False, True),
        (False, True),
        (rms_norm, layer_norm),
    )
]


def build(**kwargs):
    return Transformer(TransformerConfig(**(SMALL | kwargs)), rngs=nnx.Rngs(0))


def name(options):
    return "-".join(getattr(value, "__name__", str(value)) for value in options.values())


def random_tokens(shape=(2, 6), seed=0):
    return np.random.default_rng(seed).integers(SMALL["vocab_size"], size=shape)


def shake(model, seed=0):
    """Moves every parameter off its initial value, so that none is a 1 or 0 that could be lost."""
    rng = np.random.default_rng(seed)
    for _, parameter in nnx.to_flat_state(nnx.state(model)):
        parameter[...] += 0.1 * rng.normal(size=parameter.shape)


def loss_fn(model, tokens, **kwargs):
    logits = model(tokens[:, :-1], **kwargs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def transformer64(config, params, tokens):
    """The forward pass, example by example and head by head, in float64."""

    def normalised(p, x):
        if config.norm is layer_norm:
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p.get("bias", 0)

    def act(z):
        return z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    def rotated(x):
        half = x.shape[-1] // 2
        theta = config.rotary_base ** (-2 * np.arange(half) / x.shape[-1])
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(np.arange(len(x)), theta))
        return np.concatenate([turned.real, turned.imag], -1)

    def attention(p, x):
        y = 0
        heads, kv_heads = config.num_heads, p["key"]["kernel"].shape[1]
        for head in range(heads):
            shared = head // (heads // kv_heads)
            query = x @ p["query"]["kernel"][:, head]
            key, value = (x @ p[n]["kernel"][:, shared] for n in ("key", "value"))
            if config.query_key_norm is not None:
                query = normalised(p["query_norm"], query)
                key = normalised(p["key_norm"], key)
            if config.positions == "rotary":
                query, key = rotated(query), rotated(key)
            scores = np.exp(query @ key.T / np.sqrt(query.shape[-1]))
            scores = np.tril(scores)
            weights = scores / scores.sum(-1, keepdims=True)
            y = y + weights @ value @ p["output"]["kernel"][head]
        return y

    def mlp(p, x):
        up = x @ p["up"]["kernel"]
        hidden = act(x @ p["gate"]["kernel"]) * up if config.gated else act(up)
        return hidden @ p["down"]["kernel"]

    def sublayer(p, function, x):
        if config.norm_placement == "pre":
            return x + function(p["function"], normalised(p["input_norm"], x))
        if config.norm_placement == "post":
            return normalised(p["stream_norm"], x + function(p["function"], x))
        y = function(p["function"], normalised(p["input_norm"], x))
        return x + normalised(p["output_norm"], y)

    def forward(sequence):
        x = params["embed"]["embedding"][sequence]
        if config.positions == "learned":
            x = x + params["positions"]["embedding"][: len(sequence)]
        if config.norm_placement == "peri":
            x = normalised(params["embed_norm"], x)
        for layer in range(config.num_layers):
            x = sublayer(params["blocks"][layer]["attention"], attention, x)
            x = sublayer(params["blocks"][layer]["mlp"], mlp, x)
        if config.norm_placement != "post":
            x = normalised(params["final_norm"], x)
        if config.tie_embeddings:
            return x @ params["embed"]["embedding"].T
        return x @ params["output"]["kernel"]

    return np.stack([forward(sequence) for sequence in tokens])


def float64_params(model):
    return jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model)))


class TestNumbers:
    @pytest.mark.parametrize("options", COMBINATIONS[::3], ids=name)
    def test_logits_gradients_and_a_step_of_every_combination(self, options):
        """Values and a directional derivative against the transcription; then one step."""
        model, tokens = build(**options), random_tokens()
        shake(model)
        params = float64_params(model)
        expected = transformer64(model.config, params, tokens)
        logits = model(tokens)
        assert logits.shape == (2, 6, 11)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)

        cotangent = np.random.default_rng(1).normal(size=logits.shape)
        score = lambda model: jnp.sum(model(tokens) * cotangent)
        grads = nnx.grad(score)(model)
        rng = np.random.default_rng(2)
        direction = jax.tree.map(lambda p: rng.normal(size=p.shape), params)

        def along(step):
            moved = jax.tree.map(lambda p, v: p + step * v, params, direction)
            return np.sum(transformer64(model.config, moved, tokens) * cotangent)

        pure = jax.tree.map(np.float64, nnx.to_pure_dict(grads))
        ours = sum(jax.tree.leaves(jax.tree.map(lambda g, v: np.sum(g * v), pure, direction)))
        np.testing.assert_allclose(ours, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-3, atol=1e-3)
        for path, gradient in jax.tree_util.tree_leaves_with_path(pure):
            assert np.any(gradient), f"no gradient reaches {jax.tree_util.keystr(path)}"

        graphdef, state = nnx.split(model)
        moved = jax.tree.map(lambda p, g: p - 1e-4 * g, state, grads)
        assert score(nnx.merge(graphdef, moved)) < score(model)

    @pytest.mark.parametrize("norm", [rms_norm, layer_norm])
    @pytest.mark.parametrize("num_kv_heads", [1, 2])
    def test_grouped_heads_and_query_key_norm(self, norm, num_kv_heads):
        model = build(
            norm=norm, query_key_norm=norm, num_kv_heads=num_kv_heads, num_heads=4, features=16
        )
        shake(model)
        expected = transformer64(model.config, float64_params(model), random_tokens())
        np.testing.assert_allclose(model(random_tokens()), expected, rtol=1e-4, atol=2e-5)

    def test_rotary_base_and_activation(self):
        other = build(rotary_base=10.0)
        expected = transformer64(other.config, float64_params(other), random_tokens())
        np.testing.assert_allclose(other(random_tokens()), expected, rtol=1e-4, atol=2e-5)
        relu, gelu = build(activation=jax.nn.relu), build()
        assert np.abs(relu(random_tokens()) - gelu(random_tokens())).max() > 1e-3

    @pytest.mark.parametrize("tie_embeddings", [False, True])
    def test_logits_are_hidden_times_the_output_kernel(self, tie_embeddings):
        model, tokens = build(tie_embeddings=tie_embeddings), random_tokens()
        assert model.output_kernel().shape == (8, 11)
        expected = model.hidden(tokens) @ model.output_kernel()
        np.testing.assert_allclose(model(tokens), expected, rtol=1e-6, atol=1e-6)


class TestProperties:
    @pytest.mark.parametrize("placement", ["pre", "post", "peri"])
    @pytest.mark.parametrize("positions", ["rotary", "learned", None])
    def test_a_later_token_changes_no_earlier_logits(self, placement, positions):
        model, tokens = build(norm_placement=placement, positions=positions), random_tokens()
        changed = tokens.copy()
        changed[:, 3] = (tokens[:, 3] + 1) % 11
        before, after = model(tokens), model(changed)
        np.testing.assert_array_equal(before[:, :3], after[:, :3])
        assert np.all(np.any(before[:, 3:] != after[:, 3:], axis=-1))
        np.testing.assert_allclose(model(tokens[:, :3]), before[:, :3], atol=1e-5)

    def test_mask_hides_padding(self):
        model, tokens = build(positions="learned"), random_tokens()
        changed = tokens.copy()
        changed[:, 2] = (tokens[:, 2] + 1) % 11
        mask = (np.arange(6) != 2)[None, None, None]
        kept = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(
            model(tokens, mask=mask)[:, kept], model(changed, mask=mask)[:, kept]
        )
        assert np.any(model(tokens)[:, 3:] != model(changed)[:, 3:])

    def test_the_residual_stream_keeps_its_variance_over_depth(self):
        """Pre-norm, at the initial weights: 16 layers no more than double it."""
        model = build(num_layers=16, features=64, mlp_features=128)
        model.final_norm = None
        growth = np.var(model.hidden(random_tokens())) / np.var(model.embed(random_tokens()))
        assert 1.1 < growth < 2.5

    @pytest.mark.parametrize(
        "options",
        [
            {"layer_norm_scaling": True},
            {"norm_placement": "mix", "post_fraction": 0.34, "scan_layers": True},
            {"norm_placement": "peri", "remat": True},
        ],
        ids=name,
    )
    def test_states_are_those_of_the_model_cut_off_after_each_block(self, options):
        model, tokens = build(num_layers=3, dropout=0.3, **options), random_tokens()
        arguments = {"key": jax.random.key(1), "where": np.arange(6) < np.array([[4], [6]])}
        states = model.states(tokens, **arguments)
        np.testing.assert_array_equal(states[0, 0], model._embedded(tokens)[:6])
        np.testing.assert_array_equal(
            model.final_norm(states[-1]), model.hidden(tokens, **arguments)
        )
        cut = with_scan_layers(model, False)
        cut.final_norm = None
        for layers in (3, 2, 1):
            cut.blocks = nnx.List(cut.blocks[:layers])
            expected = cut.hidden(tokens, **arguments)
            np.testing.assert_allclose(states[layers], expected, rtol=1e-5, atol=1e-6)

    def test_remat_changes_neither_values_nor_gradients(self):
        tokens, key = random_tokens(), jax.random.key(3)
        plain, remat = (build(dropout=0.3, num_layers=1, remat=remat) for remat in (False, True))
        run = nnx.jit(nnx.value_and_grad(lambda model: loss_fn(model, tokens, key=key)))
        value, grads = run(plain)
        value_remat, grads_remat = run(remat)
        np.testing.assert_allclose(value, value_remat, rtol=1e-6)
        chex.assert_trees_all_close(
            nnx.to_pure_dict(grads), nnx.to_pure_dict(grads_remat), rtol=1e-5, atol=1e-7
        )
        jaxprs = [str(jax.make_jaxpr(lambda t: model(t))(tokens)) for model in (plain, remat)]
        assert ["remat" in text or "checkpoint" in text for text in jaxprs] == [False, True]


class TestDropout:
    def test_without_a_key_nothing_drops(self):
        tokens = random_tokens()
        np.testing.assert_array_equal(build(dropout=0.9)(tokens), build()(tokens))
        np.testing.assert_array_equal(build()(tokens, key=jax.random.key(0)), build()(tokens))

    def test_the_key_decides_what_drops(self):
        model, tokens = build(dropout=0.5), random_tokens()
        first, again, other = (model(tokens, key=jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)
        assert np.any(first != model(tokens))

    def test_keeps_the_mean_of_a_sublayer_and_drops_at_its_rate(self):
        model = build(num_layers=1, features=64, dropout=0.25)
        sublayer = model.blocks[0].mlp
        x = np.random.default_rng(0).normal(size=(4, 7, 64)).astype(np.float32)
        branch = np.asarray(sublayer(x, None)) - x
        dropped = np.stack(
            [sublayer(x, key) - x for key in jax.random.split(jax.random.key(0), 50)]
        )
        assert abs(np.mean(np.abs(dropped) < 1e-6) - 0.25) < 0.01
        kept = np.abs(dropped) > 1e-6
        np.testing.assert_allclose(
            dropped[kept], (np.broadcast_to(branch, kept.shape) / 0.75)[kept], rtol=1e-2, atol=1e-5
        )

    def test_every_sublayer_of_every_layer_draws_its_own(self):
        model = build(dropout=0.5)
        keys = []

        class Recorder(nnx.Module):
            def __call__(self, x, key, *args, **kwargs):
                keys.append(jax.random.key_data(key).tobytes())
                return x

        for block in model.blocks:
            block.attention, block.mlp = Recorder(), Recorder()
        model.hidden(random_tokens(), key=jax.random.key(0))
        assert len(keys) == len(set(keys)) == 4


class TestTypes:
    @pytest.mark.parametrize("placement", ["pre", "post", "peri"])
    def test_bfloat16_computes_in_half_and_keeps_float32_parameters(self, placement):
        kwargs = {
            "norm_placement": placement,
            "query_key_norm": rms_norm,
            "positions": "learned",
            "dropout": 0.1,
        }
        half, full = build(dtype=jnp.bfloat16, **kwargs), build(**kwargs)
        tokens = random_tokens()
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.float32.dtype}
        assert half.hidden(tokens, key=jax.random.key(0)).dtype == jnp.bfloat16
        logits = half(tokens)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, full(tokens), atol=0.1)
        grads = nnx.grad(lambda model: loss_fn(model, tokens))(half)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.float32.dtype}
        chex.assert_tree_all_finite(nnx.to_pure_dict(grads))

    def test_bfloat16_parameters(self):
        model = build(param_dtype=jnp.bfloat16, query_key_norm=rms_norm, positions="learned")
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.bfloat16.dtype}
        assert model.hidden(random_tokens()).dtype == jnp.bfloat16
        assert model(random_tokens()).dtype == jnp.float32

    def test_float64(self):
        with jax.enable_x64(True):
            model = build(param_dtype=jnp.float64, query_key_norm=rms_norm)
            logits = model(random_tokens())
            assert logits.dtype == jnp.float64
            expected = transformer64(model.config, float64_params(model), random_tokens())
            np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32])
    def test_any_integer_tokens(self, dtype):
        model, tokens = build(), random_tokens()
        np.testing.assert_array_equal(model(tokens.astype(dtype)), model(tokens))


class TestParameters:
    @pytest.mark.parametrize("options", COMBINATIONS[::5], ids=name)
    @pytest.mark.parametrize("num_kv_heads", [None, 1])
    def test_their_number(self, options, num_kv_heads):
        model = build(num_kv_heads=num_kv_heads, query_key_norm=rms_norm, **options)
        width, hidden, layers, heads, vocabulary = 8, 12, 2, 2, 11
        head_dim = width // heads
        kv_heads = num_kv_heads or heads
        per_norm = width * (2 if options["norm"] is layer_norm else 1)
        norms = {"pre": 2 * layers + 1, "post": 2 * layers, "peri": 4 * layers + 2}
        count = (
            vocabulary * width * (1 if options["tie_embeddings"] else 2)
            + (7 * width if options["positions"] == "learned" else 0)
            + layers * 2 * width * (heads + kv_heads) * head_dim
            + layers * (3 if options["gated"] else 2) * width * hidden
            + layers * 2 * head_dim  # query-key norm
            + norms[options["norm_placement"]] * per_norm
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == count

    @pytest.mark.parametrize("options", COMBINATIONS[::5], ids=name)
    def test_each_names_each_of_its_axes(self, options):
        model = build(query_key_norm=layer_norm, **options)
        known = {"embed", "heads", "kv_heads", "mlp", "norm", "vocabulary", None}
        for path, parameter in nnx.to_flat_state(nnx.state(model)):
            axes = parameter.get_metadata()["axes"]
            assert len(axes) == len(parameter.shape), path
            assert set(axes) <= known, path

    def test_initial_sizes(self):
        model = build(features=64, mlp_features=128, num_layers=8, vocab_size=500)
        std = lambda parameter: float(np.std(parameter[...]))
        block = model.blocks[3]
        assert std(model.embed.embedding) == pytest.approx(1, rel=0.05)
        assert std(block.attention.function.query.kernel) == pytest.approx(1 / 8, rel=0.05)
        assert std(block.attention.function.output.kernel) == pytest.approx(1 / 32, rel=0.05)
        assert std(block.mlp.function.down.kernel) == pytest.approx((128 * 16) ** -0.5, rel=0.05)
        tied = build(features=64, vocab_size=500, tie_embeddings=True)
        assert std(tied.embed.embedding) == pytest.approx(1 / 8, rel=0.05)
        assert not np.array_equal(
            block.mlp.function.up.kernel[...], model.blocks[4].mlp.function.up.kernel[...]
        )


class TestAsFlaxUsersExpect:
    def test_split_and_merge(self):
        model, tokens = build(query_key_norm=rms_norm, positions="learned"), random_tokens()
        graphdef, state = nnx.split(model)
        np.testing.assert_array_equal(nnx.merge(graphdef, state)(tokens), model(tokens))
        hash(graphdef)  # the static argument of a jitted function
        assert all(isinstance(leaf, nnx.Param) for _, leaf in nnx.to_flat_state(state))
        zeros = jax.tree.map(jnp.zeros_like, state)
        assert not nnx.merge(graphdef, zeros)(tokens).any()

    def test_two_of_one_configuration_share_a_graph_definition(self):
        config = TransformerConfig(**SMALL)
        first = nnx.split(config.build(rngs=nnx.Rngs(0)))[0]
        second = nnx.split(Transformer(config, rngs=nnx.Rngs(1)))[0]
        assert first == second
        assert hash(first) == hash(second)

    @pytest.mark.parametrize("remat", [False, True])
    def test_trains_under_jit_with_an_optimizer(self, remat):
        model = build(dropout=0.1, remat=remat, num_layers=1)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        tokens = random_tokens((4, 7))

        @nnx.jit
        def step(model, optimizer, key):
            loss, grads = nnx.value_and_grad(lambda model: loss_fn(model, tokens, key=key))(model)
            optimizer.update(model, grads)
            return loss

        losses = [step(model, optimizer, jax.random.key(i)) for i in range(30)]
        assert losses[-1] < 0.6 * losses[0]
        assert loss_fn(model, tokens) < 0.6 * losses[0]

    def test_abstract_construction_and_vmap(self):
        abstract = nnx.eval_shape(build)
        assert isinstance(jax.tree.leaves(nnx.state(abstract))[0], jax.ShapeDtypeStruct)
        model, tokens = build(), random_tokens((3, 2, 6))
        mapped = nnx.vmap(lambda model, t: model(t), in_axes=(None, 0))(model, tokens)
        for ours, batch in zip(mapped, tokens):
            np.testing.assert_allclose(ours, model(batch), atol=1e-5)

    def test_sharded_by_its_axes_it_gives_the_same_logits_and_gradients(self):
        sizes = {"vocab_size": 12, "features": 16, "num_heads": 4, "num_kv_heads": 2}
        model = build(
            **sizes, num_layers=1, gated=True, query_key_norm=rms_norm, positions="learned"
        )
        tokens = random_tokens((4, 6))
        graphdef, state = nnx.split(model)
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        sharded = jax.tree.map(
            lambda leaf: leaf.replace(
                jax.device_put(
                    leaf[...], logical_sharding(leaf.get_metadata()["axes"], leaf.shape, mesh)
                )
            ),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        split = {str(path): leaf[...].sharding.spec for path, leaf in nnx.to_flat_state(sharded)}
        assert sum(any(spec) for spec in split.values()) == len(split) - 5  # all but the norms

        def score(state, tokens):
            logits = nnx.merge(graphdef, state)(tokens)
            return jnp.sum(jnp.sin(logits)), logits

        @jax.jit
        def run(state, tokens):
            with use_rules(mesh):
                return jax.grad(score, has_aux=True)(state, tokens)

        rows = jax.device_put(tokens, logical_sharding(("batch", None), tokens.shape, mesh))
        assert "sdy.sharding_constraint" in run.lower(sharded, rows).as_text()
        ours = run(sharded, rows)
        expected = jax.jit(jax.grad(score, has_aux=True))(state, tokens)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), ours, expected)


class TestBadInput:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"norm_placement": "before"}, r"norm_placement must be one of .*'peri'.* 'before'"),
            ({"positions": "none"}, "positions must be one of .*'rotary'.* got 'none'"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"dropout": -0.1}, "dropout must be in"),
            ({"num_layers": 0}, "num_layers must be in"),
            ({"features": 0}, "features must be in"),
            ({"max_length": 0}, "max_length must be in"),
            ({"num_heads": 3}, "num_heads must divide features = 8"),
            ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 2, got 3"),
            ({"num_kv_heads": 0}, "num_kv_heads must be in"),
        ],
    )
    def test_configuration(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            build(**kwargs)

    @pytest.mark.parametrize(
        ("tokens", "error", "message"),
        [
            (np.zeros((2, 8), int), ValueError, r"length of at most 7\], got \(2, 8\)"),
            (np.zeros(5, int), ValueError, r"tokens must have shape .*got \(5,\)"),
            (np.zeros((1, 2, 3), int), ValueError, "tokens must have shape"),
            (np.zeros((2, 5)), TypeError, "tokens must be integers, got float64"),
            (np.zeros((2, 5), bool), TypeError, "tokens must be integers, got bool"),
        ],
    )
    def test_tokens(self, tokens, error, message):
        with pytest.raises(error, match=message):
            build()(tokens)

    def test_no_tokens(self):
        assert build(query_key_norm=rms_norm)(np.zeros((0, 5), int)).shape == (0, 5, 11)
        with pytest.raises(ValueError, match="at least one position"):
            build()(np.zeros((2, 0), int))

    @pytest.mark.parametrize("bad", [-1, 11])
    def test_an_unknown_id_gives_nan_in_its_sequence_only(self, bad):
        tokens = random_tokens()
        tokens[0, 2] = bad
        nans = np.isnan(build()(tokens))
        assert nans[0, 2:].all()
        assert not nans[1].any()
