"""How a signal travels through a residual network at initialisation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import canonical_axes, check_floating
from jaxref.core.figures import new_axes
from jaxref.core.numerics import compute_dtype


class SignalPropagation(NamedTuple):
    """The signal behind each block of a network, by `signal_propagation`.

    Attributes:
      average_channel_squared_mean: `[blocks]`; the squared means of the channels, averaged.
      average_channel_variance: `[blocks]`; the variances of the channels, averaged.
      residual_variance: `[blocks]`; the latter of the residual branch, before it is added.
    """

    average_channel_squared_mean: Array
    average_channel_variance: Array
    residual_variance: Array


def signal_propagation(
    block_outputs: Sequence[ArrayLike],
    branch_outputs: Sequence[ArrayLike],
    *,
    channel_axis: int = -1,
) -> SignalPropagation:
    r"""Mean and variance of the channels behind each block, for signal propagation plots.

        squared mean_l = mean_c (mean_{b,h,w} x_l)²,   variance_l = mean_c var_{b,h,w} x_l

    and the same variance of f_l, for blocks x_{l+1} = x_l + f_l(x_l). All three are of order one at
    any depth in a network that trains.

    Args:
      block_outputs: x, for each block the result `[batch, ..., channels]` floating point, of any
        sizes: batch and space are averaged over.
      branch_outputs: f, for each block what its residual branch adds to the stream.
      channel_axis: the axis of the channels in all of them. Default: the last.

    Returns:
      A `SignalPropagation` in at least float32.

    Raises:
      ValueError: no blocks, sequences of different lengths, or a `channel_axis` out of range.
      TypeError: an array that is not floating point.

    Use it on a new network, fed with unit normal noise: a squared mean that grows tells of the
    mean that activations add, a variance that grows of missing normalization. In networks with
    batch normalization, and in normalizer-free ones, the variance grows by a constant per block and
    falls back at the end of each stage.

    Cost: a pass or two over the outputs of all blocks and branches, which one forward pass has to
    keep.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> [float(value[0]) for value in signal_propagation([x], [x])]
      [2.0, 0.5, 0.5]

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692.
    """
    if not block_outputs or len(block_outputs) != len(branch_outputs):
        raise ValueError(
            "block_outputs and branch_outputs must be of the same blocks, at least one; "
            f"got {len(block_outputs)} and {len(branch_outputs)}"
        )
    blocks = [
        _channel_statistics(f"block_outputs[{i}]", x, channel_axis)
        for i, x in enumerate(block_outputs)
    ]
    branches = [
        _channel_statistics(f"branch_outputs[{i}]", x, channel_axis)
        for i, x in enumerate(branch_outputs)
    ]
    squared_means, variances = (jnp.stack(values) for values in zip(*blocks))
    return SignalPropagation(squared_means, variances, jnp.stack([v for _, v in branches]))


def _channel_statistics(name: str, x: ArrayLike, channel_axis: int) -> tuple[Array, Array]:
    check_floating(**{name: x})
    x = jnp.asarray(x)
    x = x.astype(compute_dtype(x))
    (channel,) = canonical_axes(channel_axis, x.ndim, name=f"channel_axis of {name}")
    others = tuple(a for a in range(x.ndim) if a != channel)
    return jnp.mean(jnp.square(jnp.mean(x, axis=others))), jnp.mean(jnp.var(x, axis=others))


def plot_signal_propagation(curves: Mapping[str, SignalPropagation], *, ax: Any = None) -> Any:
    """Draws the three signals of `signal_propagation` by block, one line a network in each.

    Args:
      curves: signals by the name of the network.
      ax: three matplotlib axes: for the squared mean, the variance, and that of the branches.
        Default: those of a new figure, side by side.

    Returns:
      An array of the three axes. A scale is logarithmic where a signal spans more than a hundred.

    Raises:
      ValueError: no curves, or an `ax` that is not three.

    Use it to see at a glance where a new design loses or multiplies its signal.

    Cost: three lines for each network, on the host.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> axes = plot_signal_propagation({"plain": signal_propagation([x], [x])})
      >>> [ax.get_title() for ax in axes]
      ['channel squared mean', 'channel variance', 'branch variance']

    Reference: Brock, De, Smith, "Characterizing signal propagation to close the performance gap in
    unnormalized ResNets", 2021, arXiv:2101.08692.
    """
    if not curves:
        raise ValueError("curves must hold at least one network")
    axes = np.ravel(new_axes(3) if ax is None else ax)
    if axes.size != 3:
        raise ValueError(f"ax must be three axes, got {axes.size}")
    titles = ("channel squared mean", "channel variance", "branch variance")
    for panel, title, field in zip(axes, titles, SignalPropagation._fields):
        lines = {name: np.asarray(getattr(signal, field)) for name, signal in curves.items()}
        for name, values in lines.items():
            panel.plot(np.arange(1, values.size + 1), values, label=name)
        drawn = np.concatenate([*lines.values()])
        if drawn.max() > 100 * drawn.min() > 0:
            panel.set_yscale("log")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(title)
        panel.set_xlabel("block")
    axes[0].legend(frameon=False)
    return axes
