"""Modules that take the place of trained batch norms at test time."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
from jax import Array

from jaxref.nn.normalization import Norm
from jaxref.norms import (
    BatchNormState,
    UnMixState,
    alpha_batch_norm,
    batch_norm,
    unmix_tns,
    unmix_tns_init,
)


class AlphaBatchNorm(nnx.Module):
    """Takes the place of a trained `Norm` with batch statistics: `jaxref.norms.alpha_batch_norm`.

    Parameters and statistics are the norm's own, under the same names, so that the model's paths
    stay as they are. `train()` and `eval()` make no difference.

    Args:
      norm: a `Norm` of `batch_norm`, `ghost_batch_norm` or `estimated_batch_norm`; its epsilon,
        and what else its function holds fixed, are kept.
      alpha: the weight of its statistics in [0, 1], against those of the batch. Default 0.9.
      mixture_moments: whether the variance counts the difference of the means.

    Attributes:
      scale, bias: the norm's parameters, None where there is none.
      state: by field, the norm's statistics, `mean` and `var`.

    Raises:
      ValueError: a norm of another function, or, when called, `alpha` not in [0, 1].

    Use it on a whole model with `nnx.recursive_map`, before `jaxref.adaptation.core_adapt_step` or
    alone; `UnMixNorm` where neighbours in the stream are of one class.

    Cost: the mean and the variance of each batch at every call, as of `jaxref.norms.batch_norm` in
    training; no state besides the norm's own.

    Example:
      >>> model = nnx.List([Norm(batch_norm, 3), Norm(batch_norm, 3)])
      >>> swap = lambda path, node: AlphaBatchNorm(node) if isinstance(node, Norm) else node
      >>> [type(norm).__name__ for norm in nnx.recursive_map(swap, model)]
      ['AlphaBatchNorm', 'AlphaBatchNorm']

    Reference: You, Li, Zhao, "Test-time Batch Statistics Calibration for Covariate Shift", 2021,
    arXiv:2110.04065.
    """

    def __init__(self, norm: Norm, *, alpha: float = 0.9, mixture_moments: bool = False):
        fixed, self.scale, self.bias, statistics = _trained(norm)
        self.function: Callable[..., Array] = partial(
            alpha_batch_norm, alpha=alpha, mixture_moments=mixture_moments, **fixed
        )
        self.state = nnx.data(statistics)

    def __call__(self, x: Array) -> Array:
        """Normalises `[batch, ..., features]`."""
        source = self.state["mean"][...], self.state["var"][...]
        return self.function(x, *source, **_parameters(self))


class UnMixNorm(nnx.Module):
    """Takes the place of a trained `Norm` with batch statistics: `jaxref.norms.unmix_tns`.

    Its components advance at every call, in `train()` and `eval()` alike. An input without
    positions, `[batch, features]`, is normalised with the statistics of training instead.

    Args:
      norm: a `Norm` of `batch_norm`, `ghost_batch_norm` or `estimated_batch_norm`; its epsilon,
        and what else its function holds fixed, are kept.
      num_components: the components, at least 1. Default 16.
      alpha: the share of the variance in the components' means, in [0, 1]. Default 0.5.
      momentum: of the components, in [0, 1]. Default 0.1, for batches of 64;
        `jaxref.norms.unmix_momentum` has others'.
      temperature: of the components' softmax, above 0. Default 0.07.
      cross_variance: whether variances count how far an example is from a component.
      rngs: source of the `params` key.

    Attributes:
      scale, bias: the norm's parameters, None where there is none.
      source: by field, the norm's statistics, `mean` and `var`.
      state: by field, the components' `means` and `variances` `[num_components, features]`, as
        `nnx.BatchStat`.

    Raises:
      ValueError: a norm of another function, or an argument out of its range; those of the
        function when called.

    Use it on a whole model with `nnx.recursive_map`, where the stream comes sorted or in small
    batches; `AlphaBatchNorm` needs no state where it does not.

    Cost: the moments of each example, arrays `[batch, num_components, features]`, and
    2 · num_components · features numbers of state.

    Example:
      >>> import jax.numpy as jnp
      >>> norm = UnMixNorm(Norm(batch_norm, 3), rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 4, 4, 3))).shape, norm.state["means"].shape
      ((2, 4, 4, 3), (16, 3))

    Reference: Tomar, Vray, Thiran, Bozorgtabar, "Un-Mixing Test-Time Normalization Statistics:
    Combatting Label Temporal Correlation", 2024, arXiv:2401.08328.
    """

    def __init__(
        self,
        norm: Norm,
        *,
        num_components: int = 16,
        alpha: float = 0.5,
        momentum: float = 0.1,
        temperature: float = 0.07,
        cross_variance: bool = False,
        rngs: nnx.Rngs,
    ):
        fixed, self.scale, self.bias, statistics = _trained(norm)
        self.function: Callable[..., Any] = partial(
            unmix_tns,
            momentum=momentum,
            temperature=temperature,
            cross_variance=cross_variance,
            **fixed,
        )
        self.without_positions: Callable[..., Any] = partial(batch_norm, training=False, **fixed)
        self.source = nnx.data(statistics)
        moments = self.source["mean"][...], self.source["var"][...]
        state = unmix_tns_init(rngs.params(), *moments, num_components, alpha)
        self.state = nnx.data(
            {
                name: nnx.BatchStat(value, axes=(None, None))
                for name, value in state._asdict().items()
            }
        )

    def __call__(self, x: Array) -> Array:
        """Normalises `[batch, ..., features]`."""
        if x.ndim == 2:
            source = BatchNormState(self.source["mean"][...], self.source["var"][...])
            return self.without_positions(x, source, **_parameters(self))[0]
        state = UnMixState(self.state["means"][...], self.state["variances"][...])
        y, state = self.function(x, state, **_parameters(self))
        for name, value in state._asdict().items():
            self.state[name][...] = value
        return y


def _trained(norm: Any) -> tuple[dict[str, Any], Any, Any, dict[str, Any]]:
    """Of a `Norm` with batch statistics: the arguments it holds fixed, scale, bias, statistics."""
    fixed = getattr(norm.function, "keywords", {})  # of a functools.partial
    name = getattr(getattr(norm.function, "func", norm.function), "__name__", "")
    if name not in {"batch_norm", "ghost_batch_norm", "estimated_batch_norm"}:
        raise ValueError(f"norm must be a Norm with batch statistics, got one of {name}")
    kept = {n: fixed[n] for n in ("scale", "bias", "epsilon", "axis_name") if n in fixed}
    return kept, norm.scale, norm.bias, norm.state


def _parameters(module: AlphaBatchNorm | UnMixNorm) -> dict[str, Any]:
    parameters = {"scale": module.scale, "bias": module.bias}
    return {name: value[...] for name, value in parameters.items() if value is not None}
