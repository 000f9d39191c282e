from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.data.span_corruption import (
    corrupt_spans,
    mixed_objective_example,
    prefix_lm_mask,
    sample_span_mask,
)
from jaxref.nn.attention import visible_positions

SENTINELS = range(259, 275)
IDS = {
    "sentinel_ids": SENTINELS,
    "separator_id": 256,
    "end_of_mask_id": 257,
    "end_of_text_id": 258,
}
LENGTH, OUTPUT = 40, 96
KEYS = jax.random.split(jax.random.key(0), 400)
TOKENS = np.random.default_rng(0).integers(0, 256, size=LENGTH, dtype=np.uint8)
DOCUMENTS = np.repeat([7, 3, 3, 3, 5], LENGTH // 5)


def runs(mask, documents):
    """(document, whether masked, tokens) of each run that is in one document."""
    entries = zip(documents, mask, range(len(mask)))
    return [
        (document, masked, [i for *_, i in group])
        for (document, masked), group in groupby(entries, key=lambda entry: entry[:2])
    ]


def literal_corruption(tokens, mask, documents):
    """The format written out, one document after another."""
    written = []
    for document in dict.fromkeys(documents):
        here = [run for run in runs(mask, documents) if run[0] == document]
        spans = [span for _, masked, span in here if masked]
        for _, masked, run in here:
            written += [SENTINELS[spans.index(run)]] if masked else list(tokens[run])
        written += [258] + [256] * bool(spans)
        for sentinel, span in zip(SENTINELS, spans):
            written += [sentinel, *tokens[span], 257]
    return written


def restored(written):
    """The documents of an example: every span put back in the place of its sentinel."""
    texts, rest = [], list(written)
    while rest:
        end = rest.index(258)
        document, rest, spans = rest[:end], rest[end + 1 :], {}
        if rest and rest[0] == 256:
            rest = rest[1:]
            while rest and rest[0] in SENTINELS and rest[0] not in spans:
                end = rest.index(257)
                spans[rest[0]], rest = rest[1:end], rest[end + 1 :]
        texts.append([])
        for token in document:
            texts[-1] += spans.pop(token) if token in SENTINELS else [token]
        assert not spans
    return texts


@partial(jax.jit, static_argnames=("documents", "output"))
def examples(keys, documents=False, causal=0.0, output=OUTPUT):
    return jax.vmap(
        lambda key: mixed_objective_example(
            key,
            TOKENS,
            **IDS,
            output_length=output,
            causal_probability=causal,
            mask_ratio_range=(0.1, 0.9),
            document_ids=DOCUMENTS if documents else None,
        )
    )(keys)


@partial(jax.jit, static_argnames=("length", "most"))
def masks(keys, ratios, mean, length=LENGTH, most=None):
    draw = lambda key, ratio: sample_span_mask(
        key, length, mask_ratio=ratio, mean_span_length=mean, max_spans=most
    )
    return jax.vmap(draw)(keys, ratios)


corrupted = jax.jit(
    jax.vmap(partial(corrupt_spans, **IDS, output_length=OUTPUT), in_axes=(None, 0))
)
corrupted_documents = jax.jit(
    jax.vmap(
        lambda tokens, mask: corrupt_spans(
            tokens, mask, **IDS, output_length=OUTPUT, document_ids=DOCUMENTS
        ),
        in_axes=(None, 0),
    )
)


class TestMask:
    def test_ratio_and_number_of_spans_are_exact(self):
        ratios = np.linspace(0, 1, len(KEYS), dtype="f")
        for mean, most in ((3.0, None), (1.0, None), (2.5, 4)):
            found = np.asarray(masks(KEYS, ratios, mean, most=most))
            for mask, ratio in zip(found, ratios):
                count = round(float(ratio * np.float32(LENGTH)))
                assert mask.sum() == count
                spans = max(1, round(count / mean))
                spans = min(spans, count, LENGTH - count + 1, most or LENGTH)
                assert sum(masked for _, masked, _ in runs(mask, np.zeros(LENGTH))) == spans

    def test_every_mask_is_alike_likely(self):
        """Of 6 tokens, 3 in 2 spans: 2 divisions by 6 places, and one may be first or last."""
        keys = jax.random.split(jax.random.key(1), 6000)
        found = masks(keys, np.full(6000, 0.5, "f"), 1.5, length=6)
        kinds, counts = np.unique(found, axis=0, return_counts=True)
        assert len(kinds) == 12
        assert np.sum((counts - 500) ** 2 / 500) < 35  # the 0.9998 quantile of 11 degrees

    def test_bad_input(self):
        key = jax.random.key(0)
        for options, message in (
            ({"mask_ratio": 1.5, "mean_span_length": 3}, r"mask_ratio must be in \[0, 1\]"),
            ({"mask_ratio": 0.5, "mean_span_length": 0.5}, r"mean_span_length must be in \[1"),
            ({"mask_ratio": 0.5, "mean_span_length": 3, "max_spans": 0}, "max_spans must be in"),
        ):
            with pytest.raises(ValueError, match=message):
                sample_span_mask(key, 8, **options)
        with pytest.raises(ValueError, match="length must be in"):
            sample_span_mask(key, 0, mask_ratio=0.5, mean_span_length=3)


class TestFormat:
    @pytest.mark.parametrize("has_documents", [False, True])
    def test_matches_the_format_written_out(self, has_documents):
        ratios = np.linspace(0, 1, len(KEYS), dtype="f")
        found = masks(KEYS, ratios, 3.0)
        documents = DOCUMENTS if has_documents else np.zeros(LENGTH, int)
        batch = (corrupted_documents if has_documents else corrupted)(TOKENS, found)
        for mask, *example in zip(np.asarray(found), *map(np.asarray, batch)):
            expected = literal_corruption(TOKENS, mask, documents)
            tokens, where, length, prefix = example
            assert tokens.dtype == np.int32  # bytes have no room for special ids
            assert length == len(expected)
            np.testing.assert_array_equal(tokens[where], expected)
            np.testing.assert_array_equal(tokens[~where], 258)
            first = expected.index(258)
            assert prefix == (first + 2 if expected[first + 1 : first + 2] == [256] else 0)

    def test_one_blank_is_the_prompt_of_the_models_card(self):
        mask = np.isin(np.arange(LENGTH), (2, 3))
        written = np.asarray(corrupted(TOKENS, np.tile(mask, (len(KEYS), 1))).tokens[0])
        prompt = [*TOKENS[:2], 259, *TOKENS[4:], 258, 256, 259]
        np.testing.assert_array_equal(written[: len(prompt)], prompt)
        np.testing.assert_array_equal(written[len(prompt) :][:3], [*TOKENS[2:4], 257])

    def test_what_does_not_fit_is_cut_and_told(self):
        whole, cut = (examples(KEYS, output=n) for n in (OUTPUT, 20))
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:, :20])
        np.testing.assert_array_equal(cut.length, whole.length)
        assert cut.where.all()
        assert np.all(np.asarray(cut.length) > 20)
        np.testing.assert_array_equal(cut.prefix_length, np.minimum(whole.prefix_length, 20))

    def test_spans_beyond_the_last_sentinel_stay(self):
        mask = np.arange(LENGTH) % 2 == 0
        example = corrupted(TOKENS, np.tile(mask, (len(KEYS), 1)))
        written = np.asarray(example.tokens[0])[np.asarray(example.where[0])].tolist()
        assert restored(written) == [TOKENS.tolist()]
        assert written.count(257) == len(SENTINELS)
        with pytest.raises(ValueError, match=r"an id for each of the 20 spans .* got 16"):
            corrupt_spans(TOKENS, mask, **IDS, output_length=OUTPUT)

    def test_bad_input(self):
        mask = np.zeros(LENGTH, bool)
        call = lambda tokens=TOKENS, mask=mask, **options: corrupt_spans(
            tokens, mask, **IDS | {"output_length": OUTPUT} | options
        )
        for options, message in (
            ({"tokens": TOKENS[None]}, r"tokens must have shape \[length\]"),
            ({"mask": mask[1:]}, r"span_mask must have shape \(40,\), got \(39,\)"),
            ({"output_length": 0}, "output_length must be in"),
            ({"separator_id": 260}, "special ids must differ from one another"),
            ({"separator_id": 257}, "special ids must differ from one another"),
            ({"sentinel_ids": []}, "sentinel_ids must have shape"),
            ({"sentinel_ids": [259, -1]}, "sentinel_ids must be in"),
            ({"document_ids": np.zeros(3, int)}, "document_ids must have shape"),
        ):
            with pytest.raises(ValueError, match=message):
                call(**options)
        for options, message in (
            ({"tokens": TOKENS / 2}, "tokens must be integers, got float"),
            ({"mask": mask.astype(int)}, "span_mask must be boolean, got int"),
            ({"document_ids": TOKENS / 2}, "document_ids must be integers"),
            ({"sentinel_ids": [259.5]}, "sentinel_ids must be integers"),
        ):
            with pytest.raises(TypeError, match=message):
                call(**options)


class TestMixture:
    @pytest.mark.claim("codegen2-mixture-objective")
    def test_every_span_goes_back_to_its_sentinel_and_none_leaves_its_document(self):
        """The text is there in every example, of one document and of three, with as many masked
        tokens as the ratio says; without corruption the example is the text."""
        texts = [TOKENS.tolist()], [part.tolist() for part in np.split(TOKENS, [8, 32])]
        for has_documents, expected in zip((False, True), texts):
            batch = examples(KEYS, has_documents)
            for tokens, where in zip(np.asarray(batch.tokens), np.asarray(batch.where)):
                assert restored(tokens[where]) == expected
        ratios = np.linspace(0.02, 1, len(KEYS), dtype="f")
        batch = jax.tree.map(np.asarray, corrupted(TOKENS, masks(KEYS, ratios, 6.0)))
        behind = np.arange(OUTPUT) >= batch.prefix_length[:, None]
        moved = np.sum(behind & batch.where & (batch.tokens < 256), axis=1)
        np.testing.assert_array_equal(moved, np.round(ratios * LENGTH))

        plain = examples(KEYS, causal=1.0)
        np.testing.assert_array_equal(plain.tokens[:, :LENGTH], np.tile(TOKENS, (len(KEYS), 1)))
        np.testing.assert_array_equal(
            plain.where, np.tile(np.arange(OUTPUT) < LENGTH, (len(KEYS), 1))
        )
        assert not plain.prefix_length.any()
        np.testing.assert_array_equal(prefix_lm_mask(0, 5), np.tri(5))
        assert prefix_lm_mask(5, 5).all()

    def test_tasks_and_ratios_have_their_shares(self):
        batch = jax.tree.map(np.asarray, examples(KEYS, causal=0.3))
        is_causal = batch.prefix_length == 0
        assert abs(is_causal.mean() - 0.3) < 4 * np.sqrt(0.21 / len(KEYS))
        behind = np.arange(OUTPUT) >= batch.prefix_length[:, None]
        moved = behind & batch.where & (batch.tokens < 256)
        ratios = moved[~is_causal].sum(axis=1) / LENGTH
        assert 0.1 <= ratios.min() < 0.15
        assert 0.85 < ratios.max() <= 0.9
        assert abs(ratios.mean() - 0.5) < 4 * 0.8 / np.sqrt(12 * len(ratios))

    def test_inputs_and_targets_are_shifted(self):
        batch = examples(KEYS)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        np.testing.assert_array_equal(batch.targets_where.sum(axis=1), batch.length - 1)

    def test_bad_input(self):
        call = partial(
            mixed_objective_example, jax.random.key(0), TOKENS, **IDS, output_length=OUTPUT
        )
        for options, message in (
            ({"causal_probability": 2.0}, r"causal_probability must be in \[0, 1\]"),
            ({"mask_ratio_range": (0.1, 1.1)}, r"mask_ratio_range must be in \[0, 1\]"),
            ({"mask_ratio_range": (0.5, 0.1)}, "mask_ratio_range must be in ascending order"),
        ):
            with pytest.raises(ValueError, match=message):
                call(**options)


class TestPrefixMask:
    def test_is_what_a_prefix_model_sees(self):
        prefixes = jnp.array([0, 3, 7])
        expected = visible_positions(jnp.tile(jnp.arange(7), (3, 1)), prefixes, 7)
        np.testing.assert_array_equal(prefix_lm_mask(prefixes, 7)[:, None], expected)

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"prefix_lengths must be in \[0, 4\]"):
            prefix_lm_mask(np.array([5]), 4)
        with pytest.raises(TypeError, match="prefix_lengths must be integers"):
            prefix_lm_mask(1.0, 4)
