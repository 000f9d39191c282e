"""One training step of each combination of a transformer's choices, and what cannot be combined."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref import attention, nn, norms
from jaxref.models import TransformerConfig

LENGTH = 6
TOKENS = np.random.default_rng(0).integers(11, size=(2, LENGTH))
NORMS = {
    "layer": norms.layer_norm,
    "rms": norms.rms_norm,
    "crms": partial(norms.compressed_rms_norm, scale=None),
    "power": norms.power_norm,
    "unified": norms.unified_norm,
    "batch": norms.batch_norm,
}
PLACEMENTS = {
    "pre": {},
    "scaled": {"layer_norm_scaling": True},
    "post": {"norm_placement": "post"},
    "peri": {"norm_placement": "peri"},
    "sandwich": {"norm_placement": "sandwich"},
    "mix": {"norm_placement": "mix", "post_fraction": 0.5},
    "deep_norm": {"norm_placement": "deep_norm"},
}
ATTENTIONS = {
    "softmax": {},
    "query-key norm": {"query_key_norm": norms.rms_norm, "num_kv_heads": 1},
    "linear": {"attention": attention.linear_attention},
    "entropy-guided": {"attention": nn.EntropyGuidedAttention},
    "third order": {"attention": nn.ThirdOrderAttention, "positions": "learned"},
    "static mixing": {"attention": nn.CausalGenerationMixer, "positions": None},
}
LINEARS = {
    "plain": {},
    "biases": {"use_bias": True},
    "sigma": {"linear": nn.SigmaReparamLinear},
    "standardized": {"linear": nn.WeightStandardizedLinear},
    "parameter tokens": {"linear": nn.ParameterAttention},
}
POSITIONS = {
    "rotary": {},
    "quarter rotary": {"rotary_fraction": 0.5},
    "learned": {"positions": "learned"},
    "alibi": {"positions": "alibi"},
    "harmonic": {
        "positions": "rotary_alibi",
        "alibi_slopes": "harmonic",
        "alibi_distance": "harmonic",
    },
}
MLPS = {
    "gelu": {},
    "swiglu": {"activation": jax.nn.silu, "gated": True},
    "crrelu": {"activation": nn.CRReLU},
    "pairs": {"activation": nn.CausalActivation},
    "experts": {"mlp": nn.MixtureOfExperts},
}
ARCHITECTURES = {
    "decoder": {},
    "encoder": {"architecture": "encoder"},
    "prefix": {"architecture": "prefix"},
    "encoder-decoder": {"architecture": "encoder_decoder"},
}
OTHERS = {
    "loop": {},
    "scan": {"scan_layers": True},
    "scan, remat": {"scan_layers": True, "remat": True},
    "tied": {"tie_embeddings": True, "embedding_gradient": 0.1},
    "stable": {"stable_embedding": True, "dropout": 0.1},
}
AXES = (NORMS, PLACEMENTS, ATTENTIONS, LINEARS, POSITIONS, MLPS, ARCHITECTURES, OTHERS)


def refused(norm, placement, mixer, linear, positions, mlp, architecture, other):
    """Why a combination cannot be, or None."""
    del norm, placement, other
    if linear == "parameter tokens" and mlp != "gelu":
        return "one map of parameter tokens in the place of the MLP"
    if mixer == "linear" and positions in ("alibi", "harmonic"):
        return "are a bias of the logits"
    if mixer == "linear" and architecture == "prefix":
        return "mask must have shape"  # one mask for all queries
    if mixer == "static mixing" and architecture != "decoder":
        return "is_causal must be True"
    return None


def combinations():
    """A draw that meets every choice several times, and one combination for each refusal."""
    rng = np.random.default_rng(0)
    drawn = [tuple(str(rng.choice(list(axis))) for axis in AXES) for _ in range(200)]
    possible = [names for names in drawn if refused(*names) is None][:26]
    for a, axis in enumerate(AXES):
        assert {names[a] for names in possible} == set(axis)
    reasons = {refused(*names): names for names in drawn}
    reasons.pop(None)
    return possible + list(reasons.values())


def options(names):
    """The fields that a combination's names stand for; a mixer's positions win."""
    _, placement, mixer, linear, positions, mlp, architecture, other = names
    fields: dict = {"norm": NORMS[names[0]]}
    parts = (placement, PLACEMENTS), (linear, LINEARS), (positions, POSITIONS), (mlp, MLPS)
    for name, axis in (*parts, (architecture, ARCHITECTURES), (other, OTHERS), (mixer, ATTENTIONS)):
        fields |= axis[name]
    return fields


def config_of(**fields):
    sizes = {
        "vocab_size": 11,
        "max_length": LENGTH,
        "num_layers": 2,
        "features": 8,
        "num_heads": 2,
        "mlp_features": 12,
    }
    return TransformerConfig(**sizes | fields)


def build(**fields):
    return config_of(**fields).build(rngs=nnx.Rngs(0))


def loss_and_gradient(model):
    """As a training step has them: statistics beside the loss, what modules owe in it."""
    graphdef, *parts = nnx.split(model, nnx.Param, nn.GradientState, nn.AuxiliaryLoss, ...)
    params, backward, *others = map(nnx.to_pure_dict, parts)
    given = {}
    if model.config.architecture == "prefix":
        given["prefix_lengths"] = np.array([2, 3])
    if model.config.architecture == "encoder_decoder":
        given["source"] = TOKENS[:, :4]

    def loss(params, backward):
        model = nnx.merge(graphdef, params, backward, *others)
        logits = model(TOKENS, key=jax.random.key(0), **given)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()
        return value + sum(map(jnp.sum, jax.tree.leaves(nnx.state(model, nn.AuxiliaryLoss))))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step, params, backward


@pytest.mark.parametrize("names", combinations(), ids=", ".join)
def test_one_step(names, make_model):
    reason = refused(*names)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):  # noqa: PT012, when built or when called
            step, *parts = loss_and_gradient(make_model(config_of(**options(names))))
            step(*parts)
        return
    step, params, backward = loss_and_gradient(make_model(config_of(**options(names))))
    value, (gradient, moved) = step(params, backward)
    assert np.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path((gradient, moved)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.any(leaf), f"nothing reaches {jax.tree_util.keystr(path)}"
    smaller = jax.tree.map(lambda p, g: p - 3e-5 * g, params, gradient)
    assert step(smaller, backward)[0] < value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_scaling": True, "norm_placement": "post"}, "layer_norm_scaling needs"),
        ({"norm": None, "norm_placement": "peri"}, "norm must be given to be placed 'peri'"),
        ({"stable_embedding": True, "tie_embeddings": True}, "tie_embeddings needs a table"),
        ({"linear": nn.ParameterAttention, "use_bias": True}, "use_bias is not for"),
        ({"attention": nn.ThirdOrderAttention}, "rotary_base has no meaning in ThirdOrder"),
        ({"attention": nn.CausalGenerationMixer, "positions": "alibi"}, "position_bias has no"),
        (
            {"attention": nn.ThirdOrderAttention, "positions": None, "num_kv_heads": 1},
            "num_kv_heads has no meaning",
        ),
        (
            {"attention": attention.linear_attention, "positions": "alibi"},
            "positions 'alibi' are a bias",
        ),
        ({"mlp": nn.ScaledFusedMLP, "gated": True}, "have no meaning in ScaledFusedMLP"),
        ({"rotary_fraction": 0.1}, "rotary_fraction must leave a pair"),
        ({"embedding_gradient": 0.0}, r"embedding_gradient must be in \(0, 1\]"),
        ({"architecture": "both"}, "architecture must be one of"),
        ({"norm_placement": "mix", "post_fraction": 1.5}, "post_fraction must be in"),
    ],
)
def test_what_cannot_be_combined_says_why(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


@pytest.mark.parametrize(
    ("architecture", "given", "message"),
    [
        ("decoder", {"prefix_lengths": np.array([1, 1])}, "prefix_lengths must be given for"),
        ("prefix", {}, "prefix_lengths must be given for architecture 'prefix'"),
        ("decoder", {"source": TOKENS}, "source must be given for architecture"),
        ("encoder_decoder", {}, "source must be given for"),
        ("decoder", {"where": np.ones((2, 3), bool)}, r"where must have shape \(2, 6\)"),
        ("prefix", {"prefix_lengths": np.array([1])}, r"prefix_lengths must have shape \(2,\)"),
    ],
)
def test_calls_that_do_not_fit_the_architecture(architecture, given, message):
    with pytest.raises(ValueError, match=message):
        build(architecture=architecture)(TOKENS, **given)


class TestMasks:
    def influence(self, model, tokens=TOKENS, **given):
        """`[changed, seen]`: whether changing a token changes the logits at each position."""
        seen = []
        before = np.asarray(model(tokens, **given))
        for i in range(LENGTH):
            changed = tokens.copy()
            changed[:, i] = (tokens[:, i] + 1) % 11
            seen.append(np.any(np.asarray(model(changed, **given)) != before, axis=(0, 2)))
        return np.array(seen)

    def test_encoder_sees_all(self):
        assert self.influence(build(architecture="encoder")).all()

    def test_prefix_is_seen_by_all_and_the_rest_by_what_follows(self):
        model = build(architecture="prefix")
        seen = self.influence(model, prefix_lengths=np.array([3, 3]))
        assert seen[:3].all()
        np.testing.assert_array_equal(seen[3:], np.tri(LENGTH).T[3:])
        causal = self.influence(model, prefix_lengths=np.array([0, 0]))
        np.testing.assert_array_equal(causal, np.tri(LENGTH).T)

    @pytest.mark.parametrize("positions", ["rotary", "learned"])
    def test_tokens_stand_where_they_are_said_to(self, positions):
        """Without a mask the order in which tokens are given does not matter, only positions do;
        rotary ones count from anywhere."""
        model = build(architecture="encoder", positions=positions)
        places = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
        logits = model(TOKENS)
        np.testing.assert_allclose(model(TOKENS, positions=places), logits, atol=1e-5)
        order = np.random.default_rng(0).permutation(LENGTH)
        shuffled = model(TOKENS[:, order], positions=places[:, order])
        np.testing.assert_allclose(shuffled, logits[:, order], atol=1e-4)
        moved = model(TOKENS, positions=places // 2)
        assert np.abs(moved - logits).max() > 1e-2
        with pytest.raises(ValueError, match="positions must have shape"):
            model(TOKENS, positions=places[:, 1:])
        biased = build(architecture="encoder", positions="alibi")
        with pytest.raises(ValueError, match="positions must be None"):
            biased(TOKENS, positions=places)

    def test_source_is_seen_by_all_and_the_target_by_what_follows(self):
        model = build(architecture="encoder_decoder")
        np.testing.assert_array_equal(self.influence(model, source=TOKENS), np.tri(LENGTH).T)
        other = TOKENS[:, ::-1].copy()
        changed = np.any(model(TOKENS, source=TOKENS) != model(TOKENS, source=other), axis=2)
        assert changed.all()

    @pytest.mark.parametrize("norm", [norms.rms_norm, norms.power_norm])
    def test_tokens_that_do_not_exist_change_nothing(self, norm):
        where = np.arange(LENGTH) < np.array([[4], [6]])
        other = np.where(where, TOKENS, (TOKENS + 3) % 11)
        given = {"architecture": "encoder", "norm": norm}
        first, second = build(**given), build(**given)
        ours, theirs = first(TOKENS, where=where), second(other, where=where)
        np.testing.assert_allclose(ours[where], theirs[where], rtol=1e-5, atol=1e-6)
        for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (first, second))):
            np.testing.assert_allclose(a, b, rtol=1e-5)

    def test_source_tokens_that_do_not_exist_change_nothing(self):
        model = build(architecture="encoder_decoder")
        where = np.arange(LENGTH) < np.array([[4], [6]])
        other = np.where(where, TOKENS, (TOKENS + 3) % 11)
        ours, theirs = (model(TOKENS, source=s, source_where=where) for s in (TOKENS, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


class TestDepthByScan:
    def test_scan_and_loop_start_alike_and_give_the_same(self):
        """Values, gradients, dropout: the layers' keys and numbers are the same."""
        key = jax.random.key(3)
        loop, scan = (
            build(
                num_layers=3, norm_placement="mix", post_fraction=0.34, scan_layers=s, dropout=0.3
            )
            for s in (False, True)
        )
        score = nnx.jit(nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(TOKENS, key=key)))))
        (value, grads), (scanned, scanned_grads) = score(loop), score(scan)
        np.testing.assert_allclose(scanned, value, rtol=1e-5)
        single, stacked = nnx.to_pure_dict(grads), nnx.to_pure_dict(scanned_grads)
        for part in ("embed", "output", "final_norm"):
            jax.tree.map(
                partial(np.testing.assert_allclose, atol=1e-5), single[part], stacked[part]
            )
        pairs = zip(map(jax.tree.leaves, single["blocks"].values()), [(0, 0), (1, 0), (1, 1)])
        for leaves, (segment, layer) in pairs:
            for ours, each in zip(leaves, jax.tree.leaves(stacked["blocks"][segment])):
                np.testing.assert_allclose(ours, each[layer], rtol=1e-4, atol=1e-5)

    def test_program_does_not_grow_with_depth(self):
        def size(layers):
            model = nnx.eval_shape(lambda: build(num_layers=layers, scan_layers=True))
            graphdef, state = nnx.split(model)
            run = jax.jit(lambda state, t: nnx.merge(graphdef, state)(t))
            return len(run.lower(state, TOKENS).as_text())

        assert size(48) < 1.02 * size(4)
