import numpy as np
import pytest

from jaxref.metrics import normalised_perplexity, steps_for_compute_class


class TestNormalisedPerplexity:
    def test_does_not_depend_on_how_the_text_is_tokenised(self):
        rng = np.random.default_rng(0)
        per_byte = rng.uniform(0.1, 2, size=24)
        expected = np.exp(per_byte.mean())
        for tokens in (24, 8, 3):  # of as many bytes each as there are
            nll = per_byte.reshape(tokens, -1).sum(1)
            np.testing.assert_allclose(normalised_perplexity(nll.sum(), 24), expected)
        np.testing.assert_allclose(normalised_perplexity([1.0, 4.0], [1, 2]), np.exp([1, 2]))

    def test_uniform_bytes_have_256(self):
        np.testing.assert_allclose(normalised_perplexity(1000 * np.log(256), 1000), 256)
        assert normalised_perplexity(0.0, 7) == 1

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="total_nll must be in"):
            normalised_perplexity(-1.0, 3)
        with pytest.raises(ValueError, match="num_bytes must be in"):
            normalised_perplexity(1.0, 0)
        with pytest.raises(ValueError, match=r"num_bytes must have shape \(2,\)"):
            normalised_perplexity([1.0, 2.0], 3)


class TestStepsForComputeClass:
    @pytest.mark.parametrize(
        ("rate", "hours", "batch", "steps"),
        [  # the authors' runs, of which they round two, of 38949.6 and 47009.5 steps, up
            (94781, 6, 80, 49982),
            (36930, 12, 80, 38949),
            (11143, 24, 84, 22385),
            (11143, 96, 160, 47009),
        ],
    )
    def test_matches_the_authors(self, rate, hours, batch, steps):
        assert steps_for_compute_class(rate, hours, batch, 512) == steps

    def test_does_not_lose_a_step_to_rounding(self):
        assert steps_for_compute_class(10, 0.7, 1, 1) == 25200
        assert steps_for_compute_class(0.7, 0.1, 1, 1) == 252  # 251.99999999999997 in binary
        assert steps_for_compute_class(1, 1, 3601, 1) == 0

    def test_bad_input_is_named(self):
        for name in ("tokens_per_second", "hours", "batch_size", "sequence_length"):
            arguments = dict.fromkeys(
                ("tokens_per_second", "hours", "batch_size", "sequence_length"), 1
            )
            with pytest.raises(ValueError, match=f"{name} must be in"):
                steps_for_compute_class(**(arguments | {name: 0}))
