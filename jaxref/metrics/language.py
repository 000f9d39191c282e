"""How good a language model is per byte of text, and how long it may train."""

from fractions import Fraction

import numpy as np
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape


def normalised_perplexity(total_nll: ArrayLike, num_bytes: ArrayLike) -> np.ndarray:
    r"""The perplexity of a language model per byte of text, whatever its tokens are.

        exp(Σ_t -log p(token_t) / bytes)

    Args:
      total_nll: the negative log-likelihood of a text, in nats and summed over its tokens, at least
        0; `[...]` for several texts.
      num_bytes: the length of the text in UTF-8 bytes, `[...]` positive.

    Returns:
      `[...]` from 1 up, in float64 on the host.

    Raises:
      ValueError: shapes that differ, a negative `total_nll`, or `num_bytes` that are not positive.

    Use it to compare models of different tokenizers; perplexity per token falls with the size of
    the tokens. Its logarithm over log 2 is bits per byte. Sum several texts up first for that of
    all of them.

    Cost: O(1) for each text, after one forward pass of the model over it.

    Example:
      >>> float(normalised_perplexity(2 * np.log(100.0), len("grün".encode())))
      6.31

    Reference: Stanić et al., "The Languini Kitchen: Enabling Language Modelling Research at
    Different Scales of Compute", 2023, arXiv:2309.11197.
    """
    total, length = np.asarray(total_nll, np.float64), np.asarray(num_bytes, np.float64)
    check_interval(0, np.inf, total_nll=total)
    check_interval(0, np.inf, closed="right", num_bytes=length)
    check_shape(total.shape, num_bytes=length)
    return np.exp(total / length)


def steps_for_compute_class(
    tokens_per_second: float, hours: float, batch_size: int, sequence_length: int
) -> int:
    r"""How many training steps a model gets in a class of equal accelerator hours.

        ⌊tokens_per_second · hours · 3600 / (batch_size · sequence_length)⌋

    Args:
      tokens_per_second: the model's throughput on the accelerator that defines the class, positive.
      hours: accelerator hours of the class, positive; the paper's are 6, 12, 24, 48 and 96.
      batch_size: sequences in a step, over all accelerators, at least 1.
      sequence_length: tokens in a sequence, at least 1.

    Returns:
      The number of steps, without error of rounding.

    Raises:
      ValueError: an argument that is not positive.

    Use it to compare architectures by what they reach in equal time rather than in equal steps or
    parameters; the learning rate should decay over exactly these steps.

    Cost: O(1); the throughput has to be measured on the accelerator before.

    Example:
      >>> steps_for_compute_class(94781, 6, 80, 512)
      49982

    Reference: Stanić et al., "The Languini Kitchen: Enabling Language Modelling Research at
    Different Scales of Compute", 2023, arXiv:2309.11197.
    """
    rates = {"tokens_per_second": tokens_per_second, "hours": hours}
    check_interval(0, np.inf, closed="right", **rates)
    check_interval(1, np.inf, batch_size=batch_size, sequence_length=sequence_length)
    # 0.1 hours as the fraction that they stand for: in binary the last step may be lost.
    rate, time = (Fraction(float(value)).limit_denominator(10**6) for value in rates.values())
    return int(rate * time * 3600 / (batch_size * sequence_length))
