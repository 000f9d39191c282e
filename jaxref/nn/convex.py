"""Networks that are convex functions of their input."""

from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxref.losses.proper import (
    ConvexPotential,
    convex_gradient_map,
    convex_potential,
    convex_potential_init,
)


class InputConvexNetwork(nnx.Module):
    """A network whose output is a strongly convex function of its input.

        F(z) = softplus(w₁) N(z) + softplus(w₀) |z|² / 2

    N has positive weights between its layers, through softplus, and free ones from the input to
    each of them. See `jaxref.losses.convex_potential`.

    Args:
      dim: D, the size of the inputs.
      hidden: units of a layer, even. Default 4.
      depth: number of hidden layers. Default 4.
      inputs: `[batch, D]`, a first batch to which the layers are normalised. Default: none.
      rngs: source of the `params` key.

    Attributes:
      variables: an `nnx.Param` for each field of `jaxref.losses.ConvexPotential`.

    Raises:
      ValueError: a size out of its range, or inputs of another shape.

    Use it for links, potentials of optimal transport and energies; `gradient` is a monotone
    bijection of the inputs' space.

    Cost: about depth · hidden · (dim + hidden / 2) parameters, as many multiplications an example;
    `gradient` is a forward and a backward pass.

    Example:
      >>> import jax.numpy as jnp
      >>> network = InputConvexNetwork(2, rngs=nnx.Rngs(0))
      >>> network(jnp.zeros((3, 2))).shape, network.gradient(jnp.zeros((3, 2))).shape
      ((3,), (3, 2))

    Reference: Lam, Walder, Penev, Nock, "LegendreTron: Uprising Proper Multiclass Loss Learning",
    2023, arXiv:2301.11695 (the network is Huang et al.'s, 2020, arXiv:2012.05942).
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 4,
        depth: int = 4,
        inputs: ArrayLike | None = None,
        rngs: nnx.Rngs,
    ):
        params = convex_potential_init(
            rngs.params(), dim, hidden=hidden, depth=depth, scores=inputs
        )
        self.variables = nnx.data(
            {
                name: nnx.Param(value, axes=(None,) * value.ndim)
                for name, value in params._asdict().items()
            }
        )

    def __call__(self, z: Array) -> Array:
        """F `[...]` of z `[..., D]`."""
        return convex_potential(self.parameters(), z)

    def gradient(self, z: Array) -> Array:
        """∇F `[..., D]` at z `[..., D]`."""
        return convex_gradient_map(self.parameters(), z)

    def parameters(self) -> ConvexPotential:
        """The parameters, as `jaxref.losses.convex_potential` takes them."""
        return ConvexPotential(**{name: value[...] for name, value in self.variables.items()})
