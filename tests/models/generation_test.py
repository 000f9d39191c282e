from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref import attention, nn, norms
from jaxref.models import TransformerConfig, generate, sample_tokens
from jaxref.models.generation import _generate
from jaxref.quantization import staircase_cache_nbytes

VOCAB, LENGTH = 11, 14
MODELS = {
    "default": {},
    "learned, tied, peri": {
        "positions": "learned",
        "tie_embeddings": True,
        "norm_placement": "peri",
    },
    "alibi, grouped": {"positions": "alibi", "num_kv_heads": 1},
    "mixed placements, scanned": {
        "norm_placement": "mix",
        "post_fraction": 0.5,
        "scan_layers": True,
    },
    "scaled norms, scanned, query-key norm": {
        "layer_norm_scaling": True,
        "scan_layers": True,
        "query_key_norm": norms.rms_norm,
    },
    "prefix": {"architecture": "prefix", "positions": "rotary_alibi"},
    "encoder-decoder": {"architecture": "encoder_decoder", "scan_layers": True},
    "linear attention": {"attention": attention.linear_attention},
    "entropy-guided": {"attention": nn.EntropyGuidedAttention},
    "third order": {"attention": nn.ThirdOrderAttention, "positions": "learned"},
    "static mixing": {"attention": nn.CausalGenerationMixer, "positions": None},
    "experts": {"mlp": nn.MixtureOfExperts},
    "statistics": {"norm": norms.power_norm},
}


def config_of(**kwargs):
    sizes = {
        "vocab_size": VOCAB,
        "max_length": LENGTH,
        "num_layers": 2 if kwargs.get("scan_layers") else 1,
        "features": 8,
        "num_heads": 2,
        "mlp_features": 12,
    }
    return TransformerConfig(**sizes | kwargs)


@pytest.fixture
def build(make_model):
    """`build(**fields)`: a model with random parameters."""
    return lambda **kwargs: make_model(config_of(**kwargs))


def prompts_and_lengths(batch=3, n=5):
    rng = np.random.default_rng(0)
    return rng.integers(VOCAB, size=(batch, n)), np.array([n, 2, 3])[:batch]


def recomputed(model, prompts, lengths, num_tokens, prefix_lengths=None, **source):
    """The most probable tokens, everything computed again at every step."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def following(tokens, ends):
        model = nnx.merge(graphdef, state)
        model.eval()
        kwargs = dict(source)
        if model.config.architecture == "prefix":
            kwargs["prefix_lengths"] = lengths if prefix_lengths is None else prefix_lengths
        logits = model(tokens, **kwargs)
        return jnp.argmax(jnp.take_along_axis(logits, ends[:, None, None] - 1, 1)[:, 0], axis=-1)

    tokens = np.zeros((len(prompts), LENGTH), int)
    for row, prompt, length in zip(tokens, prompts, lengths):
        row[:length] = prompt[:length]
    drawn = np.zeros((len(prompts), num_tokens), int)
    for step in range(num_tokens):
        drawn[:, step] = following(tokens, lengths + step)
        for row, token, end in zip(tokens, drawn[:, step], lengths + step):
            row[end] = token
    return drawn


class TestAgreesWithRecomputing:
    @pytest.mark.parametrize("name", MODELS)
    def test_prompts_of_different_lengths(self, build, name):
        model = build(**MODELS[name])
        prompts, lengths = prompts_and_lengths()
        source = {}
        if model.config.architecture == "encoder_decoder":
            where = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
            source = {"source": prompts[:, :4], "source_where": where}
        ours = generate(model, prompts, lengths, num_tokens=8, temperature=0.0, **source)
        np.testing.assert_array_equal(ours, recomputed(model, prompts, lengths, 8, **source))
        assert len(np.unique(ours)) > 2  # not one token over and over

    def test_a_prefix_shorter_than_the_prompt(self, build):
        model = build(architecture="prefix")
        prompts, lengths = prompts_and_lengths()
        given = {"prefix_lengths": lengths - 1}
        ours = generate(model, prompts, lengths, num_tokens=6, temperature=0.0, **given)
        np.testing.assert_array_equal(ours, recomputed(model, prompts, lengths, 6, **given))
        with pytest.raises(ValueError, match=r"prefix_lengths must have shape \(3,\)"):
            generate(model, prompts, lengths, num_tokens=1, temperature=0.0, prefix_lengths=[1])
        with pytest.raises(ValueError, match="prefix_lengths must be None for architecture"):
            generate(build(), prompts, lengths, num_tokens=1, temperature=0.0, **given)

    def test_a_temperature_that_depends_on_the_logits(self, build):
        """Near 0 it takes the most probable token; sequences may have different ones."""
        model = build()
        prompts, lengths = prompts_and_lengths()

        def by_row(scale, logits):
            return scale * jnp.arange(len(logits))

        def drawn(seed, scale):
            temperature = jax.tree_util.Partial(by_row, jnp.float32(scale))
            key = jax.random.key(seed)
            return generate(model, prompts, lengths, num_tokens=6, temperature=temperature, key=key)

        greedy = generate(model, prompts, lengths, num_tokens=6, temperature=0.0)
        np.testing.assert_array_equal(drawn(0, 1e-6), greedy)
        hot = drawn(0, 50.0)
        np.testing.assert_array_equal(hot[0], greedy[0])  # at temperature 0
        assert np.any(hot[1:] != greedy[1:], axis=1).all()
        assert np.any(drawn(1, 50.0) != hot)
        with pytest.raises(ValueError, match="key must be given"):
            generate(
                model,
                prompts,
                num_tokens=1,
                temperature=jax.tree_util.Partial(by_row, jnp.float32(1)),
            )

    def test_what_pads_a_prompt_does_not_matter(self, build):
        model = build()
        prompts, lengths = prompts_and_lengths()
        padding = np.arange(5) >= lengths[:, None]
        run = partial(generate, model, lengths=lengths, num_tokens=4, temperature=0.0)
        other = np.where(padding, -7, prompts)  # not even an id
        np.testing.assert_array_equal(run(prompts), run(other))

    def test_states_step_by_step_are_those_of_the_whole(self, build):
        model = build()
        tokens = np.random.default_rng(3).integers(VOCAB, size=(2, 9))
        cache = model.init_cache(2)
        parts = []
        for piece in np.split(tokens, [4, 5], axis=1):
            hidden, cache = model.extend(piece, cache)
            parts.append(hidden)
        np.testing.assert_allclose(
            np.concatenate(parts, axis=1), model.hidden(tokens), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(cache.lengths, [9, 9])


class TestStaircase:
    def test_without_a_full_block_it_is_the_full_cache(self, build):
        model = build()
        prompts, lengths = prompts_and_lengths()
        run = partial(generate, model, prompts, lengths, num_tokens=6, temperature=0.0)
        np.testing.assert_array_equal(run(cache="staircase", block=LENGTH), run())

    def test_error_and_bytes_fall_apart_with_the_bits(self, build):
        """The fewer bits for older tokens, the larger the error and the smaller the cache."""
        model = build(features=32, num_heads=1, max_length=64)
        tokens = np.random.default_rng(2).integers(VOCAB, size=(2, 64))
        exact = np.asarray(model.hidden(tokens))
        errors, sizes = [], []
        for bits in ((16, 8), (16, 8, 4, 2)):
            cache = model.init_cache(2, kind="staircase", block=8, bits=bits, group_size=8)
            hidden, cache = jax.jit(model.extend)(tokens, cache)
            errors.append(np.abs(hidden - exact).mean() / np.abs(exact).mean())
            sizes.append(sum(staircase_cache_nbytes(layer["attention"]) for layer in cache.layers))
        full = sum(x.nbytes for x in jax.tree.leaves(model.init_cache(2).layers))
        assert errors[0] < 0.01
        assert 3 * errors[0] < errors[1] < 0.5
        assert full > sizes[0] > sizes[1]
        assert sizes[1] < 0.5 * full


class TestSampleTokens:
    logits = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2]))

    def frequencies(self, draws=4000, **kwargs):
        keys = jax.random.split(jax.random.key(0), draws)
        drawn = jax.vmap(lambda key: sample_tokens(self.logits, key, **kwargs))(keys)
        return np.bincount(drawn, minlength=5) / draws

    @pytest.mark.parametrize(
        ("kwargs", "expected"),
        [
            ({}, [0.4, 0.05, 0.3, 0.05, 0.2]),
            ({"temperature": 0.5}, np.square([0.4, 0.05, 0.3, 0.05, 0.2]) / 0.295),
            ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0, 0]),
            ({"top_k": 4}, [0.4, 0.05, 0.3, 0.05, 0.2]),  # the fourth and fifth are alike
            ({"top_p": 0.39}, [1, 0, 0, 0, 0]),
            ({"top_p": 0.5}, [4 / 7, 0, 3 / 7, 0, 0]),
            ({"top_p": 0.89}, [4 / 9, 0, 3 / 9, 0, 2 / 9]),
            ({"top_k": 3, "top_p": 0.7}, [4 / 7, 0, 3 / 7, 0, 0]),
            ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ],
    )
    def test_frequencies(self, kwargs, expected):
        np.testing.assert_allclose(self.frequencies(**kwargs), expected, atol=0.03)

    def test_extreme_logits_and_half_precision(self):
        logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
        tokens = sample_tokens(jnp.asarray(logits, jnp.bfloat16), jax.random.key(0), top_p=0.5)
        assert tokens[0] == 0
        assert tokens.shape == (2,)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"temperature": -1.0}, "temperature must be in"),
            ({"top_k": -1}, "top_k must be in"),
            ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
            ({}, "key must be given at a temperature above 0"),
        ],
    )
    def test_bad_input(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            sample_tokens(self.logits, None, **kwargs)
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            sample_tokens(np.arange(3), temperature=0.0)


class TestGenerate:
    def test_one_program_whatever_is_drawn(self, build):
        model = build()
        prompts, lengths = prompts_and_lengths()
        _generate.clear_cache()
        for num_tokens, temperature, top_p in ((2, 0.7, 0.9), (7, 1.3, 0.5), (3, 0.0, 0.8)):
            run = partial(generate, model, num_tokens=num_tokens, temperature=temperature)
            run(prompts, lengths, top_p=top_p, key=jax.random.key(num_tokens))
            run(prompts + 1 - 1, lengths[::-1].copy(), top_p=top_p, key=jax.random.key(0))
        assert _generate._cache_size() == 1

    def test_key_decides_and_rows_differ(self, build):
        model = build()
        prompts = np.ones((4, 2), int)
        draw = lambda seed: generate(model, prompts, num_tokens=10, key=jax.random.key(seed))
        first = draw(0)
        np.testing.assert_array_equal(first, draw(0))
        assert np.any(first != draw(1))
        assert len({tuple(row) for row in np.asarray(first).tolist()}) == 4

    def test_evaluation_whatever_the_mode(self, build):
        """Statistics are neither moved nor taken from the prompt."""
        model = build(norm=norms.power_norm)
        model.train()
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
        generate(model, np.ones((1, 2), int), num_tokens=2, temperature=0.0)
        after = nnx.to_pure_dict(nnx.state(model))
        jax.tree.map(np.testing.assert_array_equal, before, after)

    def test_fills_the_cache_to_the_last_position(self, build):
        model = build(positions="learned")
        prompt = np.ones((1, 4), int)
        tokens = generate(model, prompt, num_tokens=LENGTH - 3, temperature=0.0)
        whole = np.concatenate([prompt, tokens], axis=1)
        assert whole.shape == (1, LENGTH + 1)
        np.testing.assert_array_equal(model(whole[:, :-1])[0, 3:].argmax(-1), whole[0, 4:])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"prompts": [1, 2]},
                r"prompts must be \[batch, at least one token\], got shape \(2,\)",
            ),
            ({"prompts": [[]]}, r"prompts must be .* got shape \(1, 0\)"),
            ({"prompts": [[1, VOCAB]]}, r"prompts must be in \[0, 10\]"),
            ({"lengths": [1, 2]}, r"lengths must have shape \(1,\)"),
            ({"lengths": [0]}, r"lengths must be in \[1, 2\]"),
            ({"lengths": [3]}, r"lengths must be in \[1, 2\]"),
            ({"num_tokens": 0}, "num_tokens must be in"),
            ({"num_tokens": LENGTH}, r"num_tokens must be at most 13 after a prompt of 2 tokens"),
            ({"temperature": 0.5}, "key must be given"),
            ({"cache": "half"}, "kind must be 'full' or 'staircase', got 'half'"),
            ({"source": [[1]]}, "source must be given for architecture 'encoder_decoder'"),
        ],
    )
    def test_bad_input(self, build, changes, message):
        model = build()
        given = {"prompts": [[1, 2]], "num_tokens": 3, "temperature": 0.0} | changes
        if "source" in given:
            given["source"] = np.array(given["source"])
        with pytest.raises(ValueError, match=message):
            generate(model, np.array(given.pop("prompts"), int), **given)

    def test_models_that_cannot_go_on(self, build):
        with pytest.raises(ValueError, match="'encoder' sees what follows"):
            build(architecture="encoder").init_cache(1)
        with pytest.raises(ValueError, match="kind must be 'full' for ThirdOrderAttention"):
            build(**MODELS["third order"]).init_cache(1, kind="staircase")
        with pytest.raises(ValueError, match="max_length must be in"):
            build().init_cache(1, max_length=LENGTH + 1)
