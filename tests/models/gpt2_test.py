import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxref import norms
from jaxref.models import generate, gpt2_config, load_gpt2, save_safetensors, with_scan_layers

VOCAB, LENGTH, LAYERS, WIDTH, HEADS = 13, 9, 2, 8, 2
SIZES = {
    "vocab_size": VOCAB,
    "max_length": LENGTH,
    "num_layers": LAYERS,
    "features": WIDTH,
    "num_heads": HEADS,
    "mlp_features": 4 * WIDTH,
}
TOKENS = np.random.default_rng(5).integers(VOCAB, size=(2, 7))


def random_file():
    """Tensors as Hugging Face's GPT-2 files name and shape them, none at a value that hides."""
    rng = np.random.default_rng(0)
    shapes = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (LENGTH, WIDTH)}
    for i in range(LAYERS):
        shapes |= {
            f"h.{i}.ln_1.weight": (WIDTH,),
            f"h.{i}.ln_1.bias": (WIDTH,),
            f"h.{i}.attn.c_attn.weight": (WIDTH, 3 * WIDTH),
            f"h.{i}.attn.c_attn.bias": (3 * WIDTH,),
            f"h.{i}.attn.c_proj.weight": (WIDTH, WIDTH),
            f"h.{i}.attn.c_proj.bias": (WIDTH,),
            f"h.{i}.ln_2.weight": (WIDTH,),
            f"h.{i}.ln_2.bias": (WIDTH,),
            f"h.{i}.mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
            f"h.{i}.mlp.c_fc.bias": (4 * WIDTH,),
            f"h.{i}.mlp.c_proj.weight": (4 * WIDTH, WIDTH),
            f"h.{i}.mlp.c_proj.bias": (WIDTH,),
        }
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def forward64(tensors, tokens):
    """GPT-2's forward pass, head by head, in float64."""
    p = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    def gelu(z):
        return z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def one(sequence):
        x = p["wte.weight"][sequence] + p["wpe.weight"][: len(sequence)]
        size = WIDTH // HEADS
        for i in range(LAYERS):
            q, k, v = np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
            heads = []
            for h in range(HEADS):
                part = slice(h * size, (h + 1) * size)
                scores = np.tril(np.exp(q[:, part] @ k[:, part].T / math.sqrt(size)))
                heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
            x = x + linear(np.concatenate(heads, -1), f"h.{i}.attn.c_proj")
            x = x + linear(
                gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj"
            )
        return norm(x, "ln_f") @ p["wte.weight"].T

    return np.stack([one(sequence) for sequence in tokens])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(random_file(), path)
    return path


class TestLoad:
    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_logits_are_those_of_a_literal_forward_pass(self, file, scan_layers):
        model = load_gpt2(file, num_heads=HEADS, scan_layers=scan_layers)
        expected = forward64(load_file(file), TOKENS)
        np.testing.assert_allclose(model(TOKENS), expected, rtol=2e-4, atol=2e-4)

    def test_prefixes_masks_and_tied_heads(self, tmp_path):
        tensors = random_file()
        wrapped = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
        wrapped["lm_head.weight"] = tensors["wte.weight"]
        for i in range(LAYERS):
            wrapped[f"transformer.h.{i}.attn.bias"] = np.tri(LENGTH, dtype=np.float32)[None, None]
            wrapped[f"transformer.h.{i}.attn.masked_bias"] = np.float32([-1e4])
        save_file(wrapped, tmp_path / "wrapped.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"n_head": HEADS}))
        model = load_gpt2(tmp_path / "wrapped.safetensors")
        assert model.config.num_heads == HEADS
        np.testing.assert_allclose(model(TOKENS), forward64(tensors, TOKENS), rtol=2e-4, atol=2e-4)

    def test_heads_of_released_models(self, tmp_path):
        config = gpt2_config(**SIZES | {"features": 128, "mlp_features": 16, "num_layers": 1})
        save_safetensors(config.build(rngs=nnx.Rngs(0)), tmp_path / "wide.safetensors")
        assert load_gpt2(tmp_path / "wide.safetensors").config.num_heads == 2

    def test_types_and_generation(self, file):
        model = load_gpt2(file, num_heads=HEADS, param_dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {
            jax.numpy.dtype("bfloat16")
        }
        tokens = generate(model, TOKENS[:, :3], num_tokens=4, temperature=0.0)
        assert tokens.shape == (2, 4)

    def test_what_is_not_a_gpt2_is_named(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
            load_gpt2(tmp_path / "nothing")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(file.read_bytes()[:50])
        with pytest.raises(ValueError, match=r"broken.safetensors is not a safetensors file"):
            load_gpt2(broken)
        for change, message in (
            ({"wte.weight": None}, "has no tensor wte.weight: it is not a GPT-2"),
            ({"h.1.ln_2.bias": None}, r"h.1.ln_2.bias must have shape \(8,\), got None"),
            ({"ln_f.bias": np.zeros(7, "f")}, r"ln_f.bias must have shape \(8,\), got \(7,\)"),
            ({"extra": np.zeros(7, "f")}, r"tensor extra must have shape None, got \(7,\)"),
        ):
            tensors = {k: v for k, v in (random_file() | change).items() if v is not None}
            save_file(tensors, tmp_path / "other.safetensors")
            with pytest.raises(ValueError, match=message):
                load_gpt2(tmp_path / "other.safetensors", num_heads=HEADS)


class TestSave:
    def test_the_file_of_a_loaded_model_is_the_same(self, file, tmp_path):
        model = load_gpt2(file, num_heads=HEADS, scan_layers=True)
        save_safetensors(model, tmp_path / "again.safetensors")
        ours, expected = load_file(tmp_path / "again.safetensors"), load_file(file)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(ours[name], tensor, err_msg=name)

    def test_a_failure_leaves_the_old_file(self, file, monkeypatch):
        import safetensors.numpy

        def fail(*args, **kwargs):
            raise OSError("no space left")

        before = file.read_bytes()
        monkeypatch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(OSError, match="no space left"):
            save_safetensors(load_gpt2(file, num_heads=HEADS), file)
        assert file.read_bytes() == before

    @pytest.mark.parametrize(
        ("changes", "names"),
        [
            ({"norm": norms.rms_norm}, "norm"),
            ({"positions": "rotary", "use_bias": False}, "positions, use_bias"),
            ({"num_kv_heads": 1}, "num_kv_heads"),
            ({"tie_embeddings": False}, "tie_embeddings"),
        ],
    )
    def test_other_models_are_refused(self, changes, names, tmp_path):
        model = gpt2_config(**SIZES | changes).build(rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=f"not of GPT-2's form: its {names} differ"):
            save_safetensors(with_scan_layers(model), tmp_path / "model.safetensors")
