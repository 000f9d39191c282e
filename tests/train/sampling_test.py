import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models import Transformer
from jaxref.train.program import build
from jaxref.train.sampling import check_request, sample

VOCAB, WINDOW = 11, 8


def model(**changes):
    config = {
        "vocab_size": VOCAB,
        "max_length": WINDOW,
        "num_layers": 1,
        "features": 16,
        "num_heads": 2,
        "mlp_features": 32,
    }
    return Transformer.Config(**config | changes).build(rngs=nnx.Rngs(1))


def draw(model, prompt, length, temperature=0.0, seed=0):
    key = jax.random.key(seed)
    return sample(model, np.array(prompt), length=length, temperature=temperature, key=key)


@pytest.mark.parametrize(
    ("prompt", "positions"),
    [([3], "rotary"), ([1, 2, 3], "learned"), ([i % 11 for i in range(20)], "rotary")],
)
def test_temperature_zero_takes_the_most_probable_token(prompt, positions):
    """Also where text is longer than the window, which then starts again with its later half."""
    net = model(positions=positions)
    logits = jax.jit(net)
    expected, start = list(prompt), 0
    for _ in range(12):
        if len(expected) - start > WINDOW:
            start = len(expected) - WINDOW // 2
        seen = expected[start:]
        padded = np.array([seen + [0] * (WINDOW - len(seen))])  # the model is causal
        expected.append(int(logits(padded)[0, len(seen) - 1].argmax()))
    tokens = draw(net, prompt, length=12)
    assert tokens.dtype.kind == "i"
    assert tokens.tolist() == expected


def test_a_prefix_model_is_asked():
    """What is added to the tokens of a window is not a part of the text, and its last token not of
    the prefix."""
    net = model(architecture="prefix")
    expected = [1, 2, 3]
    for _ in range(4):  # as many as the window has room for
        seen = np.array([[1, 2, 3, 9, 10, *expected[3:]]])
        expected.append(int(net(seen, prefix_lengths=np.array([4]))[0, -1].argmax()))
    asked = lambda tokens: np.append(tokens, [9, 10])
    tokens = sample(net, np.array([1, 2, 3]), length=10, temperature=0.0, asked=asked)
    assert tokens.size == 13
    assert tokens[:7].tolist() == expected


def test_length_and_prompt_are_kept():
    tokens = draw(model(), [5, 6], length=30, temperature=1.0)
    assert tokens.shape == (32,)
    assert tokens[:2].tolist() == [5, 6]
    assert tokens.min() >= 0
    assert tokens.max() < VOCAB


def test_key_decides():
    net = model()
    first = draw(net, [1], 40, 1.0, seed=0)
    assert draw(net, [1], 40, 1.0, seed=0).tolist() == first.tolist()
    assert draw(net, [1], 40, 1.0, seed=1).tolist() != first.tolist()
    assert len(set(first.tolist())) > 3  # not the same draw at every position


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_from_the_softmax_of_the_scaled_logits(temperature):
    net, prompt, draws = model(), [1, 2, 3], 400
    net.output.kernel[...] *= 4
    logits = net(jnp.array([prompt]))[0, -1]
    probabilities = jax.nn.softmax(logits / temperature)
    drawn = [draw(net, prompt, 1, temperature, seed)[-1] for seed in range(draws)]
    frequencies = np.bincount(drawn, minlength=VOCAB) / draws
    deviation = np.sqrt(probabilities * (1 - probabilities) / draws)
    assert np.all(np.abs(frequencies - probabilities) < 4 * deviation + 1e-3)
    assert np.any(
        np.abs(frequencies - jax.nn.softmax(logits)) > 4 * deviation
    )  # the temperature shows


def test_low_temperature_is_nearly_zero():
    net = model()
    assert draw(net, [4], 10, 1e-4).tolist() == draw(net, [4], 10, 0.0).tolist()


def test_bfloat16():
    tokens = draw(model(dtype=jnp.bfloat16), [1, 2], 10, 1.0)
    assert tokens.shape == (12,)


def test_sharded_parameters_give_the_same_text(tiny_config):
    program = build(tiny_config("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), 256)
    params = program.init(jax.random.key(0)).params
    local = jax.tree.map(np.asarray, params)
    texts = [
        draw(nnx.merge(program.graphdef, leaves), [100, 101], 20).tolist()
        for leaves in (params, local)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, r"prompt must be \[n\] with at least one token, got shape \(0,\)"),
        ([[1, 2]], {}, r"prompt must be \[n\].* got shape \(1, 2\)"),
        ([1, 11], {}, r"prompt must be in \[0, 10\]"),
        ([-1], {}, r"prompt must be in \[0, 10\]"),
        ([1], {"length": 0}, r"length must be in"),
        ([1], {"temperature": -0.5}, r"temperature must be in"),
        ([1], {"temperature": np.nan}, r"temperature must be in"),
    ],
)
def test_bad_input(prompt, changes, message):
    arguments = {"length": 3, "temperature": 1.0} | changes
    with pytest.raises(ValueError, match=message):
        sample(model(), np.array(prompt, int), key=jax.random.key(0), **arguments)
    with pytest.raises(ValueError, match=message):
        check_request(np.array(prompt, int), VOCAB, **arguments)
