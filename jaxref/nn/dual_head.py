"""Two heads on one backbone: one for the labels, one for the teacher."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval
from jaxref.nn.linear import Linear
from jaxref.nn.normalization import Norm
from jaxref.norms import batch_norm


class DualHeadClassifier(nnx.Module):
    """A main head for cross-entropy and inference, and an auxiliary one for distillation.

        main:       h W + b
        auxiliary:  h W' + b',  or  relu(batch_norm(dropout(h W₁ + b₁))) W₂ + b₂

    Args:
      in_features: size of the backbone's features h.
      classes: number of classes.
      auxiliary: "linear", the paper's for ImageNet, or "nonlinear", its for CIFAR-100. Default
        "linear".
      hidden: units of the nonlinear head. Default 200, the paper's.
      dropout: rate of the nonlinear head, in [0, 1). Default 0.1, the paper's.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key, and of `dropout` keys, one at each call in training.

    Attributes:
      main, auxiliary: the two heads. Inference calls `main` alone, and can drop the other.

    Raises:
      ValueError: another `auxiliary`, a `dropout` outside of [0, 1), or an input of the wrong size.

    Use it where distillation and cross-entropy would disturb each other in one head; train it with
    `jaxref.losses.dual_head_distillation_loss`.

    Cost: (in_features + 1) · classes parameters a linear head, as many multiplications; those of
    the auxiliary one in training alone.

    `train()` and `eval()` of this or any enclosing module tell dropout and batch norm which it is.

    Example:
      >>> heads = DualHeadClassifier(8, 3, auxiliary="nonlinear", rngs=nnx.Rngs(0))
      >>> main, auxiliary = heads(jnp.ones((2, 8)))
      >>> main.shape, auxiliary.shape
      ((2, 3), (2, 3))

    Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits
    Utilization with an Auxiliary Head", 2024, arXiv:2411.08937.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        auxiliary: str = "linear",
        hidden: int = 200,
        dropout: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if auxiliary not in ("linear", "nonlinear"):
            raise ValueError(f"auxiliary must be 'linear' or 'nonlinear', got {auxiliary!r}")
        check_interval(0, 1, closed="left", dropout=dropout)
        linear = partial(Linear, use_bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.main = linear(in_features, classes, axes=("embed", None))
        self.auxiliary: Any = (
            linear(in_features, classes, axes=("embed", None))
            if auxiliary == "linear"
            else nnx.Sequential(
                linear(in_features, hidden, axes=("embed", "mlp")),
                nnx.Dropout(dropout, rngs=rngs),
                Norm(batch_norm, hidden, axes=("mlp",), param_dtype=param_dtype),
                jax.nn.relu,
                linear(hidden, classes, axes=("mlp", None)),
            )
        )

    def __call__(self, features: Array) -> tuple[Array, Array]:
        """Main and auxiliary logits `[..., classes]` of `[..., in_features]`."""
        return self.main(features), self.auxiliary(features)
