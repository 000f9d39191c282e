from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from jaxref.data.blank_infilling import blank_infilling_example
from jaxref.data.span_corruption import prefix_lm_mask
from jaxref.models import TransformerConfig

MASK, GMASK, START, END = 256, 257, 258, 259
IDS = {"mask_id": MASK, "gmask_id": GMASK, "start_id": START, "end_id": END}
LENGTH, OUTPUT = 48, 72
TOKENS = np.random.default_rng(0).integers(0, 256, size=LENGTH)
KEYS = jax.random.split(jax.random.key(0), 400)


@partial(jax.jit, static_argnames=("objective", "output", "ratio", "mean"))
def examples(keys, objective="mixed", tokens=TOKENS, output=OUTPUT, ratio=0.15, mean=3.0):
    make = lambda key: blank_infilling_example(
        key,
        tokens,
        **IDS,
        output_length=output,
        objective=objective,
        span_ratio=ratio,
        span_mean=mean,
    )
    return jax.vmap(make)(keys)


def each(batch):
    """The examples one by one, of numpy arrays without what is behind their end."""
    arrays = jax.tree.map(np.asarray, batch)
    for i, length in enumerate(arrays.length):
        yield type(batch)(*(x[i][:length] if x.ndim == 2 else x[i] for x in arrays))


def pieces_of(example):
    """(tokens, targets, positions, block positions) of each piece, without the context."""
    c = example.context_length
    rows = [x[c:] for x in (example.tokens, example.targets)]
    rows += [x[c:] for x in (example.positions, example.block_positions)]
    starts = np.flatnonzero(rows[0] == START)
    return list(zip(*(np.split(row, starts[1:]) for row in rows)))


def restored(example):
    """The text: what each piece has for targets, put in the place of its blank."""
    context = list(example.tokens[: example.context_length])
    fill = {int(p[0]): t[:-1].tolist() for _, t, p, _ in pieces_of(example)}
    assert sorted(fill) == [i for i, token in enumerate(context) if token in (MASK, GMASK)]
    return [t for i, token in enumerate(context) for t in fill.get(i, [token])]


def drawn_lengths(rng, length, mean, least):
    """Spans until `least` tokens are in them, or there is no room for the next."""
    sizes = []
    while sum(sizes) < least:
        size = min(rng.poisson(mean), length)
        if sum(sizes) + size + len(sizes) > length:
            break
        sizes += [size] * (size > 0)
    return sizes


class TestExample:
    def test_the_text_can_be_put_together_again(self):
        seen = set()
        for example in each(examples(KEYS)):
            assert restored(example) == TOKENS.tolist()
            blanks = example.tokens[example.tokens >= MASK]
            used = GMASK if example.uses_gmask else MASK
            assert set(blanks) == {used, START}
            seen.add(used)
        assert seen == {MASK, GMASK}

    def test_matches_the_layout_written_out(self):
        """Of the pieces' order and lengths, everything else follows."""
        for example in each(examples(KEYS, "mask")):
            c = int(example.context_length)
            assert not example.where[:c].any()
            assert example.where[c:].all()
            np.testing.assert_array_equal(example.positions[:c], np.arange(c))
            assert not example.block_positions[:c].any()
            for tokens, targets, positions, blocks in pieces_of(example):
                np.testing.assert_array_equal(tokens, [START, *targets[:-1]])
                assert targets[-1] == END
                assert len(set(positions)) == 1
                np.testing.assert_array_equal(blocks, 1 + np.arange(len(tokens)))
            np.testing.assert_array_equal(example.rotary_positions, example.positions)

    def test_the_end_is_blanked_at_any_length(self):
        lengths = []
        for example in each(examples(KEYS, "gmask")):
            c = int(example.context_length)
            expected = [*TOKENS[: c - 1], GMASK, START, *TOKENS[c - 1 :]]
            np.testing.assert_array_equal(example.tokens, expected)
            np.testing.assert_array_equal(example.targets[c:], [*TOKENS[c - 1 :], END])
            assert np.all(example.positions[c:] == c - 1)
            np.testing.assert_array_equal(example.rotary_positions, np.arange(LENGTH + 2))
            lengths.append(LENGTH - c + 1)
        assert min(lengths) <= 3
        assert max(lengths) >= LENGTH - 2
        uniform_std = np.sqrt((LENGTH**2 - 1) / 12)
        assert abs(np.mean(lengths) - (LENGTH + 1) / 2) < 4 * uniform_std / np.sqrt(len(KEYS))

    def test_lengths_are_those_of_drawing_until_the_share_is_reached(self):
        """Against the loop: how many spans there are, how many tokens, how many of a length."""
        rng = np.random.default_rng(0)
        least = int(0.15 * LENGTH)
        found = [[len(p[0]) - 1 for p in pieces_of(e)] for e in each(examples(KEYS, "mask"))]
        expected = [drawn_lengths(rng, LENGTH, 3.0, least) for _ in range(10_000)]
        for of in (len, sum, max, lambda sizes: sizes.count(1), lambda sizes: sizes.count(3)):
            values = [of(sizes) for sizes in expected]
            error = 4 * np.std(values) / np.sqrt(len(found))
            assert abs(np.mean([of(sizes) for sizes in found]) - np.mean(values)) < error
        assert all(sum(sizes) - max(sizes) < least <= sum(sizes) for sizes in found)

    def test_places_and_orders_are_random_and_spans_do_not_touch(self):
        orders, edges, ends = [], [], []
        for example in each(examples(KEYS, "mask")):
            pieces = pieces_of(example)
            blanks = np.array([p[2][0] for p in pieces])
            assert min(np.diff(np.sort(blanks)), default=2) >= 2
            edges.append((0 in blanks, example.context_length - 1 in blanks))
            if len(pieces) > 1:
                sizes = np.array([len(p[0]) - 1 for p in pieces])
                ends.append(sizes[[np.argmin(blanks), np.argmax(blanks)]])
                orders.append((sizes[0] - sizes[-1], blanks[0] < blanks[-1]))
        assert 0.4 < np.mean([forward for _, forward in orders]) < 0.6
        shares = np.mean(edges, axis=0)
        assert abs(shares[0] - shares[1]) < 4 * np.sqrt(2 * shares.mean() / len(edges))
        assert shares.min() > 0.02
        for differences in (np.diff(ends), [difference for difference, _ in orders]):
            error = 4 * np.std(differences) / np.sqrt(len(ends))
            assert abs(np.mean(differences)) < error

    def test_objectives_have_their_shares(self):
        uses_gmask = np.asarray(examples(KEYS).uses_gmask)
        assert abs(uses_gmask.mean() - 0.7) < 4 * np.sqrt(0.21 / len(KEYS))
        assert not examples(KEYS, "mask").uses_gmask.any()
        assert examples(KEYS, "gmask").uses_gmask.all()

    def test_what_does_not_fit_is_cut_and_told(self):
        whole, cut = (jax.tree.map(np.asarray, examples(KEYS, output=n)) for n in (OUTPUT, 30))
        for name in ("tokens", "targets", "where", "positions", "block_positions"):
            np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[:, :30])
        np.testing.assert_array_equal(cut.length, whole.length)
        np.testing.assert_array_equal(cut.context_length, np.minimum(whole.context_length, 30))
        behind = np.arange(OUTPUT) >= whole.length[:, None]
        assert not whole.where[behind].any()
        assert np.all(whole.tokens[behind] == END)

    def test_few_tokens_and_a_large_share(self):
        rng = np.random.default_rng(0)
        for tokens, ratio, mean in ((TOKENS[:1], 0.15, 40.0), (TOKENS[:7], 0.95, 1.5)):
            masked = []
            for example in each(examples(KEYS, "mask", tokens, OUTPUT, ratio, mean)):
                assert restored(example) == tokens.tolist()
                masked.append(sum(len(p[0]) - 1 for p in pieces_of(example)))
            least = max(int(ratio * len(tokens)), 1)
            expected = [sum(drawn_lengths(rng, len(tokens), mean, least)) for _ in range(10_000)]
            error = 4 * np.std(expected) / np.sqrt(len(masked))
            assert abs(np.mean(masked) - np.mean(expected)) <= error

    def test_bad_input(self):
        call = lambda tokens=TOKENS, **options: blank_infilling_example(
            jax.random.key(0), tokens, **IDS | {"output_length": OUTPUT} | options
        )
        for options, message in (
            ({"objective": "smask"}, "objective must be one of"),
            ({"start_id": MASK}, "special ids must differ from one another"),
            ({"span_mean": 0.0}, "span_mean must be in"),
            ({"span_ratio": 1.0}, r"span_ratio must be in \(0, 1\)"),
            ({"short_mask_probability": -0.1}, "short_mask_probability must be in"),
            ({"output_length": 0}, "output_length must be in"),
            ({"tokens": TOKENS[None]}, r"tokens must have shape \[length\]"),
        ):
            with pytest.raises(ValueError, match=message):
                call(**options)
        with pytest.raises(TypeError, match="tokens must be integers"):
            call(TOKENS / 2)


class TestPrefixModel:
    def test_context_lengths_are_the_prefix_lengths_of_a_transformer(self):
        def hidden(architecture, **options):
            config = TransformerConfig(
                vocab_size=260,
                max_length=OUTPUT,
                num_layers=1,
                features=8,
                num_heads=2,
                mlp_features=8,
                architecture=architecture,
            )
            model = config.build(rngs=nnx.Rngs(0))
            return jax.jit(lambda tokens: model.hidden(tokens, **options))(batch.tokens)

        batch = jax.tree.map(lambda x: x[:4], examples(KEYS))
        found = hidden("prefix", prefix_lengths=batch.context_length)
        mask = prefix_lm_mask(batch.context_length, OUTPUT)
        np.testing.assert_allclose(found, hidden("encoder", mask=mask[:, None]), rtol=1e-5)
