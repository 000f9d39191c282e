import numpy as np
import pytest
from flax import nnx

from jaxref.models import ConvTokenizer, TextTokenizer


class TestImages:
    @pytest.mark.parametrize(
        ("size", "options", "tokens"),
        [
            ((32, 32), {}, 256),
            ((32, 32), {"num_layers": 2}, 64),
            ((224, 224), {"kernel_size": 7, "num_layers": 2}, 196),
            ((9, 13), {"kernel_size": 5, "num_layers": 2, "strides": 2}, 1),
            ((8, 8), {"padding": 0}, 9),
        ],
    )
    def test_number_of_tokens(self, size, options, tokens):
        def run():
            tokenizer = ConvTokenizer(3, 4, rngs=nnx.Rngs(0), **options)
            assert tokenizer.num_tokens(*size) == tokens
            return tokenizer(np.zeros((2, *size, 3), np.float32))

        assert nnx.eval_shape(run).shape == (2, tokens, 4)


class TestWords:
    @pytest.mark.parametrize(("kernel_size", "strides"), [(4, 1), (3, 2)])
    def test_words_match_a_literal_convolution(self, kernel_size, strides, make_module):
        tokenizer = make_module(
            lambda: TextTokenizer(5, 6, kernel_size=kernel_size, strides=strides, rngs=nnx.Rngs(0))
        )
        rng = np.random.default_rng(0)
        x = rng.normal(size=(3, 11, 5)).astype(np.float32)
        lengths = np.array([11, 4, 0])
        where = np.arange(11) < lengths[:, None]
        kernel = np.asarray(tokenizer.conv.kernel[...], np.float64)
        padding = max(1, kernel_size // 2)
        tokens, exists = tokenizer(x, where=where)
        plain, everywhere = tokenizer(x)
        assert everywhere is None
        for sequence, mask, ours, known in zip(x, where, tokens, exists):
            padded = np.pad(sequence, ((padding, padding), (0, 0)))
            seen = np.pad(mask, padding)
            starts = range(0, len(padded) - kernel_size + 1, strides)
            rows = [
                np.maximum(np.tensordot(padded[s : s + kernel_size], kernel, 2), 0) for s in starts
            ]
            hits = [seen[s : s + kernel_size].any() for s in starts]
            for i in range(0, len(rows) + 2 - 3 + 1, 2):
                window = range(max(i - 1, 0), min(i + 2, len(rows)))
                assert known[i // 2] == any(hits[j] for j in window)
                expected = np.max([rows[j] for j in window], axis=0) * known[i // 2]
                np.testing.assert_allclose(ours[i // 2], expected, rtol=1e-4, atol=1e-5)
            assert len(ours) == (len(rows) - 1) // 2 + 1
        np.testing.assert_array_equal(tokens[0], plain[0])
        assert not exists[2].any()
