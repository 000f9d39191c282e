"""Token mixing without weights, as a module."""

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxref.attention import causal_pair_reduction
from jaxref.attention.static_mixing import Context, Reduction, check_pair_reduction


class CausalActivation(nnx.Module):
    """An activation that joins each token with the one before it.

        y_t = reduce(x_t, x_{t-1}),    y_0 = x_0

    with a mean over the tokens as third candidate where a context is asked for: see
    `jaxref.attention.causal_pair_reduction`. It has no parameters.

    Args:
      reduction: "min", "max" or "mean". Default "min".
      context: None, "causal" or "global", of which the last sees the tokens to come. Default None.

    Raises:
      ValueError: an unknown `reduction` or `context`.

    Use it as the `activation` of an `MLP` that sees `[..., tokens, features]`, whose hidden units
    then see two tokens each: an elementwise activation sees one.

    Cost: no parameters; elementwise, and with a context a sum over the tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> print(CausalActivation()(jnp.array([[3.0], [1.0], [2.0]])).ravel())
      [3. 1. 1.]

    Reference: Hilsenbek, "Breaking the Attention Bottleneck", 2024, arXiv:2406.10906.
    """

    def __init__(self, reduction: Reduction = "min", context: Context = None):
        check_pair_reduction(reduction, context)
        self.reduction, self.context = reduction, context

    def __call__(self, x: Array, *, where: ArrayLike | None = None) -> Array:
        """Maps `[..., tokens, features]` to the same; `where`, broadcastable to it, is False at
        tokens that do not exist."""
        return causal_pair_reduction(x, reduction=self.reduction, context=self.context, where=where)
