"""Scaling laws of a fine-tuned model in the tokens that it was pretrained on."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
from jax.typing import ArrayLike
from scipy.special import log_expit

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.figures import new_axes

Verdict = Literal["useful", "misaligned", "unneeded"]

_SMALLEST = 1e-6  # of what a score law raises to a power
_EXPONENTS = (0.1, 0.3, 0.6, 1.0, 2.0, 4.0)
_RANGE_OF_BETA = 0.02, 1e3  # so that A is neither 0 nor infinite, nor f a power of nearly 1
_DECAYS = (0.03, 0.1, 0.2, 0.4, 0.8, 2.0)
_RANGE_OF_DECAY = 1e-6, 20.0


def downstream_log_law(
    pretraining_tokens: ArrayLike, log_a: ArrayLike, alpha: ArrayLike, beta: ArrayLike
) -> np.ndarray:
    r"""The score of a fine-tuned model by the tokens of its pretraining (log-law).

        f(D) = (log(A D^α))^β = (log A + α log D)^β

    Args:
      pretraining_tokens: D `[...]`, positive, in any unit.
      log_a: log A, of any sign; A itself has no range where β is small.
      alpha: α at least 0.
      beta: β above 0.

    Returns:
      f of the shape that the arguments broadcast to, computed in float64 on the host, with a base
      of at least 1e-6.

    Raises:
      ValueError: a number out of its range.

    Use it for BLEU, ROUGE, COMET or accuracy, and `downstream_loss_law` for the cross-entropy.

    Cost: O(1) for each number of tokens.

    Example:
      >>> print(downstream_log_law([1e8, 1e9, 1e10], log_a=-10.0, alpha=2.0, beta=1.0).round(2))
      [26.84 31.45 36.05]

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """
    check_interval(0, np.inf, closed="right", pretraining_tokens=pretraining_tokens, beta=beta)
    check_interval(0, np.inf, alpha=alpha)
    check_interval(-np.inf, np.inf, log_a=log_a)
    base = np.asarray(log_a, float) + np.multiply(alpha, np.log(np.asarray(pretraining_tokens)))
    return np.maximum(base, _SMALLEST) ** np.asarray(beta, float)


def downstream_loss_law(
    pretraining_tokens: ArrayLike, e: ArrayLike, a: ArrayLike, alpha: ArrayLike
) -> np.ndarray:
    r"""The cross-entropy of a fine-tuned model by the tokens of its pretraining.

        L(D) = E + A / D^α

    Args:
      pretraining_tokens: D `[...]`, positive, in any unit.
      e: E at least 0, the loss that no pretraining gets below.
      a: A at least 0.
      alpha: α at least 0.

    Returns:
      L of the shape that the arguments broadcast to, computed in float64 on the host.

    Raises:
      ValueError: a number out of its range.

    Use it for the loss on the downstream task alone: it may go on falling where scores,
    `downstream_log_law`, do not rise.

    Cost: O(1) for each number of tokens.

    Example:
      >>> print(downstream_loss_law([1e8, 1e10], e=1.0, a=100.0, alpha=0.25))
      [2.         1.31622777]

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """
    check_interval(0, np.inf, closed="right", pretraining_tokens=pretraining_tokens)
    check_interval(0, np.inf, e=e, a=a, alpha=alpha)
    powers = np.asarray(pretraining_tokens, float) ** -np.asarray(alpha, float)
    return np.asarray(e, float) + np.asarray(a, float) * powers


class LawFit(NamedTuple):
    """A law fitted to the smallest of several pretrainings, in the order of their tokens.

    Attributes:
      params: `[3]`, the law's parameters in its order: log A, α, β or E, A, α.
      tokens: D `[points]`, rising.
      observations: the scores or losses `[points]`.
      predictions: those of the law.
      residuals: log prediction - log observation `[points]`.
      num_fit: of how many points, the first, the law was fitted.
      prediction_error: mean size of prediction - observation over the others, or, without any,
        over all.
      converged: whether the optimizer says so of the best fit.

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """

    params: np.ndarray
    tokens: np.ndarray
    observations: np.ndarray
    predictions: np.ndarray
    residuals: np.ndarray
    num_fit: int
    prediction_error: float
    converged: bool


def fit_downstream_log_law(
    tokens: ArrayLike,
    scores: ArrayLike,
    *,
    huber_delta: float = 0.1,
    initial_grid: Sequence[Sequence[float]] | None = None,
    num_fit: int | None = None,
) -> LawFit:
    r"""Fits `downstream_log_law` to the scores of models with different pretraining.

        min over A, α, β of Σ_i huber_δ(log f(D_i) - log y_i)

    over the `num_fit` smallest D, by trust-region steps from each of a grid of starts (the paper
    takes L-BFGS), with α above 0 and β within 0.02 and 1000.

    Args:
      tokens: D `[points]`, positive, in any order.
      scores: y `[points]`, positive: BLEU, say, on a scale of any size.
      huber_delta: δ above 0, beyond which a residual counts by its size and no more by its square.
        Default 0.1, the paper's.
      initial_grid: (log A, α, β) of each start. Default: six exponents β from 0.1 to 4, each with
        the least squares line of y^(1/β) over log D.
      num_fit: how many points to fit, at least 3. Default: all. The paper takes 4 and predicts the
        others.

    Returns:
      A `LawFit`, computed in float64 on the host.

    Raises:
      ValueError: shapes that differ, fewer than three different D to fit, or numbers out of range.

    Use it where `pretraining_value_report` finds the pretraining useful: with scores that fall the
    best law is flat. Three parameters fit any three points, so look at `prediction_error`.

    Cost: up to 200 trust-region steps in three parameters from each start, on the host; each point
    is a pretraining and a fine-tuning.

    Example:
      >>> tokens = 10.0 ** np.arange(8, 12)
      >>> fit = fit_downstream_log_law(tokens, downstream_log_law(tokens, -10.0, 2.0, 0.8))
      >>> print(downstream_log_law(1e12, *fit.params).round(2))
      21.11

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """
    x, y, num_fit = _checked(tokens, num_fit, scores=scores)
    center = np.log(x[:num_fit]).mean()  # measured from the middle, for the fit's condition
    z = np.log(x[:num_fit]) - center

    if initial_grid is None:
        starts = []
        for beta in _EXPONENTS:
            slope, middle = np.polyfit(z, y[:num_fit] ** (1 / beta), 1)
            starts.append((middle, max(slope, 1e-3 * middle), beta))
    else:
        grid = _checked_grid(initial_grid)
        check_interval(0, np.inf, closed="right", **{"alpha and beta of initial_grid": grid[:, 1:]})
        starts = [(max(log_a + a * center, _SMALLEST), a, beta) for log_a, a, beta in grid]

    # log f = level + β log(1 + s z / β): level, slope and curvature hardly depend on each other,
    # as log A, α and β do
    def log_law(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        level, s, beta = theta[0], np.exp(theta[1]), np.exp(theta[2])
        q = s * z / beta
        base = np.maximum(1 + q, _SMALLEST)
        inside = 1 + q > _SMALLEST
        one, steep = np.ones_like(z), inside * q / base
        jacobian = np.stack([one, beta * steep, beta * (np.log(base) - steep)], axis=1)
        outside = np.stack([0 * one, -q, q], axis=1) * ~inside[:, None]
        predictions = level + beta * np.log(base)
        return np.append(predictions, base - (1 + q)), np.append(jacobian, outside, axis=0)

    middle, slope, beta = np.transpose(starts)
    start = np.stack([beta * np.log(middle), np.log(slope * beta / middle), np.log(beta)], axis=1)
    bounds = (-np.inf, np.inf), (-30.0, 30.0), np.log(_RANGE_OF_BETA)
    theta, converged = _best_fit(log_law, start, bounds, np.log(y[:num_fit]), huber_delta)
    level, (s, beta) = theta[0], np.exp(theta[1:])
    middle = np.exp(level / beta)
    alpha = s * middle / beta
    params = np.array([middle - alpha * center, alpha, beta])
    return _law_fit(downstream_log_law(x, *params), params, x, y, num_fit, converged)


def fit_downstream_loss_law(
    tokens: ArrayLike,
    losses: ArrayLike,
    *,
    huber_delta: float = 1e-3,
    initial_grid: Sequence[Sequence[float]] | None = None,
    num_fit: int | None = None,
) -> LawFit:
    r"""Fits `downstream_loss_law` to the cross-entropy of models with different pretraining.

        min over E, A, α of Σ_i huber_δ(log L(D_i) - log y_i)

    over the `num_fit` smallest D, by trust-region steps from each of a grid of starts (the paper
    takes L-BFGS), with E, A and α above 0 and α below 20.

    Args:
      tokens: D `[points]`, positive, in any order.
      losses: y `[points]`, positive.
      huber_delta: δ above 0, beyond which a residual counts by its size and no more by its square.
        Default 1e-3, the paper's.
      initial_grid: positive (E, A, α) of each start. Default: six α from 0.03 to 2, each with the
        E and A at least 0 of least squares.
      num_fit: how many points to fit, at least 3. Default: all. The paper takes 4 and predicts the
        others.

    Returns:
      A `LawFit`, computed in float64 on the host.

    Raises:
      ValueError: shapes that differ, fewer than three different D to fit, or numbers out of range.

    Use it beside `fit_downstream_log_law`, not for it: a loss that falls as predicted says little
    about the scores.

    Cost: up to 200 trust-region steps in three parameters from each start, on the host; each point
    is a pretraining and a fine-tuning.

    Example:
      >>> tokens = 10.0 ** np.arange(8, 12)
      >>> fit = fit_downstream_loss_law(tokens, downstream_loss_law(tokens, 1.2, 50.0, 0.2))
      >>> print(downstream_loss_law(1e12, *fit.params).round(3))
      1.399

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """
    x, y, num_fit = _checked(tokens, num_fit, losses=losses)
    center = np.log(x[:num_fit]).mean()
    z = np.log(x[:num_fit]) - center
    if initial_grid is None:
        starts = []
        for alpha in _DECAYS:
            columns = np.stack([np.ones_like(z), np.exp(-alpha * z)], axis=1)
            (e, middle), _ = scipy.optimize.nnls(columns, y[:num_fit])
            starts.append((*np.maximum((e, middle), 1e-3 * y.min()), alpha))
    else:
        grid = _checked_grid(initial_grid)
        check_interval(0, np.inf, closed="right", initial_grid=grid)
        starts = [(e, a * np.exp(-alpha * center), alpha) for e, a, alpha in grid]

    # log L = level + log(w + (1 - w) e^(-α z)), w the share of E in the middle
    def loss_law(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_w, log_rest = log_expit(theta[1]), log_expit(-theta[1])
        alpha = np.exp(theta[2])
        log_total = np.logaddexp(log_w, log_rest - alpha * z)
        share, rest = np.exp(log_w - log_total), np.exp(log_rest - alpha * z - log_total)
        slope = share * np.exp(log_rest) - rest * np.exp(log_w)
        return theta[0] + log_total, np.stack([np.ones_like(z), slope, -alpha * z * rest], axis=1)

    e, falling, alpha = np.transpose(starts)
    start = np.stack([np.log(e + falling), np.log(e / falling), np.log(alpha)], axis=1)
    bounds = (-np.inf, np.inf), (-30.0, 30.0), np.log(_RANGE_OF_DECAY)
    theta, converged = _best_fit(loss_law, start, bounds, np.log(y[:num_fit]), huber_delta)
    w, alpha = scipy.special.expit(theta[1]), np.exp(theta[2])
    params = np.array([w, (1 - w) * np.exp(alpha * center), alpha])
    params[:2] *= np.exp(theta[0])
    return _law_fit(downstream_loss_law(x, *params), params, x, y, num_fit, converged)


def translation_alignment_score(source_share: ArrayLike, target_share: ArrayLike) -> np.ndarray:
    r"""How well the languages of pretraining go with a translation task.

        P_source P_target + 0.7 P_source + 0.8 P_target

    with the shares P of the two languages in the pretraining tokens. The language that is to be
    written counts more, and both together most.

    Args:
      source_share: P_source `[...]` in [0, 1], of the language that is translated.
      target_share: P_target `[...]` in [0, 1], of the other, with a sum of at most 1.

    Returns:
      The scores, of the shape that the shares broadcast to, in [0, 1].

    Raises:
      ValueError: shares out of range, or of a sum above 1.

    Use it to order mixtures before any is trained on; `pretraining_value_report` judges by results.

    Cost: O(1) for each mixture, and no training.

    Example:
      >>> print(translation_alignment_score([0.5, 1.0, 0.0], [0.5, 0.0, 1.0]))
      [1.  0.7 0.8]

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """
    check_interval(0, 1, source_share=source_share, target_share=target_share)
    source, target = np.asarray(source_share, float), np.asarray(target_share, float)
    if np.any(source + target > 1 + 1e-6):
        raise ValueError(
            f"source_share and target_share must have a sum of at most 1, got {source + target}"
        )
    return source * target + 0.7 * source + 0.8 * target


class ValueReport(NamedTuple):
    """Whether pretraining data is worth its tokens for a task, by `pretraining_value_report`.

    Attributes:
      verdict: "useful", "misaligned" or "unneeded".
      score_fit, loss_fit: the two `LawFit`s.
      score_error: `prediction_error` of the scores over their mean.
      score_drop: the largest fall of a score below a score of fewer tokens, as a share of that.
      losses_fall: whether each loss is below that of fewer tokens.

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """

    verdict: Verdict
    score_fit: LawFit
    loss_fit: LawFit
    score_error: float
    score_drop: float
    losses_fall: bool


def pretraining_value_report(
    tokens: ArrayLike,
    scores: ArrayLike,
    losses: ArrayLike,
    *,
    baseline_score: float | None = None,
    tolerance: float = 0.02,
    num_fit: int | None = None,
) -> ValueReport:
    r"""Judges pretraining data by the scores of models that were fine-tuned after more of it.

        unneeded     no score is above that of a model without pretraining
        misaligned   scores fall by more than the tolerance, or do not follow the log-law
        useful       the others, whose `score_fit` predicts what more tokens are worth

    The losses have no say: of data that goes poorly with the task they fall all the same.

    Args:
      tokens: D `[points]`, positive, in any order.
      scores: of the task `[points]`, positive, larger for better.
      losses: cross-entropy on the task `[points]`, positive.
      baseline_score: that of the same model without pretraining. Default: not known, and the
        verdict never "unneeded".
      tolerance: at least 0, the relative fall and the relative error of the fit that are taken for
        noise. Default 0.02.
      num_fit: as of `fit_downstream_log_law`.

    Returns:
      A `ValueReport`.

    Raises:
      ValueError: as `fit_downstream_log_law`, or a negative `tolerance` or `baseline_score`.

    Use it on a few short pretrainings before a long one.

    Cost: the fits of both laws, on the host; each point is a pretraining and a fine-tuning.

    Example:
      >>> tokens = 10.0 ** np.arange(8, 12)
      >>> losses = downstream_loss_law(tokens, 1.2, 50.0, 0.2)
      >>> pretraining_value_report(tokens, [20.0, 24.0, 23.0, 19.0], losses).verdict
      'misaligned'

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177. The tolerance is
    a choice of this library.
    """
    check_interval(0, np.inf, tolerance=tolerance)
    if baseline_score is not None:
        check_interval(0, np.inf, baseline_score=baseline_score)
    score_fit = fit_downstream_log_law(tokens, scores, num_fit=num_fit)
    loss_fit = fit_downstream_loss_law(tokens, losses, num_fit=num_fit)
    y = score_fit.observations
    best = np.maximum.accumulate(y)
    score_drop = float(np.max(1 - y / best))
    score_error = score_fit.prediction_error / float(y.mean())
    verdict: Verdict = "useful"
    if baseline_score is not None and best[-1] <= baseline_score:
        verdict = "unneeded"
    elif score_drop > tolerance or score_error > tolerance:
        verdict = "misaligned"
    losses_fall = bool(np.all(np.diff(loss_fit.observations) < 0))
    return ValueReport(verdict, score_fit, loss_fit, score_error, score_drop, losses_fall)


def plot_downstream_law(fit: LawFit, *, ax: Any = None) -> Any:
    """Draws the observations over their tokens, the fitted law, and where the fit ended.

    Args:
      fit: from `fit_downstream_log_law` or `fit_downstream_loss_law`.
      ax: matplotlib axes. Default: those of a new figure.

    Returns:
      The axes, with tokens on a logarithmic scale; points that were not fitted are hollow.

    Use it to see whether the law also meets the points that it was not fitted to, before it is
    taken further than they reach.

    Cost: one point for each pretraining, on the host.

    Example:
      >>> fit = fit_downstream_loss_law([1e8, 1e9, 1e10, 1e11], [3.0, 2.0, 1.5, 1.3], num_fit=3)
      >>> plot_downstream_law(fit).get_xscale()
      'log'

    Reference: Isik, Ponomareva, Hazimeh, Paparas, Vassilvitskii, Koyejo, "Scaling Laws for
    Downstream Task Performance of Large Language Models", 2024, arXiv:2402.04177.
    """
    ax = new_axes() if ax is None else ax
    n = fit.num_fit
    ax.plot(fit.tokens, fit.predictions, color="C0", label="law")
    ax.scatter(fit.tokens[:n], fit.observations[:n], color="C0", label="fitted")
    if n < len(fit.tokens):
        hollow = {"facecolors": "none", "edgecolors": "C0"}
        ax.scatter(fit.tokens[n:], fit.observations[n:], **hollow, label="predicted")
    ax.set_xscale("log")
    ax.set_xlabel("pretraining tokens")
    ax.legend(frameon=False)
    return ax


def _checked(
    tokens: ArrayLike, num_fit: int | None, **observations: ArrayLike
) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens and observations in the order of the tokens, and how many to fit."""
    ((name, values),) = observations.items()
    x, y = np.asarray(tokens, float), np.asarray(values, float)
    if x.ndim != 1:
        raise ValueError(f"tokens must have shape [points], got {x.shape}")
    check_shape(x.shape, **{name: y})
    check_interval(0, np.inf, closed="right", tokens=x, **{name: y})
    num_fit = len(x) if num_fit is None else num_fit
    check_interval(0, len(x), num_fit=num_fit)
    x, y = np.stack([x, y])[:, np.argsort(x, kind="stable")]
    if np.unique(x[:num_fit]).size < 3:
        raise ValueError(f"tokens must hold at least three different numbers to fit, got {x}")
    return x, y, num_fit


def _checked_grid(initial_grid: Sequence[Sequence[float]]) -> np.ndarray:
    grid = np.asarray(initial_grid, float)
    if grid.ndim != 2 or grid.shape[1] != 3 or len(grid) == 0:
        raise ValueError(f"initial_grid must have shape [starts, 3], got {grid.shape}")
    return grid


def _best_fit(
    law: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    starts: np.ndarray,
    bounds: Sequence[Sequence[float] | np.ndarray],
    log_y: np.ndarray,
    huber_delta: float,
) -> tuple[np.ndarray, bool]:
    """The parameters of the lowest Huber loss, and whether the optimizer was content with them.

    `law` gives log predictions, after them what is to be 0, and the Jacobian of both.
    """
    check_interval(0, np.inf, closed="neither", huber_delta=huber_delta)
    low, high = np.array(bounds, float).T

    def residuals(theta: np.ndarray) -> np.ndarray:
        predicted, _ = law(theta)
        predicted[: len(log_y)] -= log_y
        return predicted

    fits = [
        scipy.optimize.least_squares(
            residuals,
            np.clip(start, low + 1e-6, high - 1e-6),
            jac=lambda theta: law(theta)[1],
            bounds=(low, high),
            loss="huber",
            f_scale=huber_delta,
            ftol=1e-15,
            xtol=1e-12,
            gtol=1e-15,
            max_nfev=200,
        )
        for start in starts
    ]
    best = min(fits, key=lambda fit: fit.cost)
    return best.x, bool(best.success)


def _law_fit(
    f: np.ndarray, params: np.ndarray, x: np.ndarray, y: np.ndarray, num_fit: int, converged: bool
) -> LawFit:
    held_out = slice(num_fit, None) if num_fit < len(x) else slice(None)
    error = float(np.mean(np.abs(f - y)[held_out]))
    return LawFit(params, x, y, f, np.log(f) - np.log(y), num_fit, error, converged)
