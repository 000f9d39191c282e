"""Argument checks that run at trace time and name the argument.

Each check takes the values as keywords, so that the name in the message is the name in the
caller's signature: `check_interval(0, 1, closed="left", b1=b1, b2=b2)`. Values that are traced
(hyperparameters under `optax.inject_hyperparams`, say) have no concrete value to test and pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_interval(low: float, high: float, /, *, closed: str = "both", **values: Any) -> None:
    """Raises ValueError unless every value lies between `low` and `high`.

    Args:
      low: lower end; may be -inf.
      high: upper end; may be inf. An infinite end never admits the infinite value itself.
      closed: which ends belong to the interval: "both", "left", "right" or "neither".
      **values: numbers or concrete arrays, by the name of the argument; every element is tested.

    Raises:
      ValueError: a value is outside, or is NaN or infinite.
      TypeError: a value is not a real number.

    >>> check_interval(0, 1, closed="left", b1=0.9)
    >>> check_interval(0, 1, closed="left", b1=1.0)
    Traceback (most recent call last):
      ...
    ValueError: b1 must be in [0, 1), got 1.0
    """
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        array = array.astype(np.float64)
        above = array >= low if closed in ("both", "left") else array > low
        below = array <= high if closed in ("both", "right") else array < high
        if not np.all(np.isfinite(array) & above & below):
            left = "[" if closed in ("both", "left") and np.isfinite(low) else "("
            right = "]" if closed in ("both", "right") and np.isfinite(high) else ")"
            raise ValueError(f"{name} must be in {left}{low}, {high}{right}, got {value}")


def check_floating(**arrays: Any) -> None:
    """Raises TypeError unless every array has a floating-point type.

    >>> check_floating(logits=jnp.zeros(3))
    """
    for name, array in arrays.items():
        if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise TypeError(
                f"{name} must have a floating-point type, got {jnp.result_type(array).name}"
            )


def check_shape(expected: tuple[int, ...], /, **arrays: Any) -> None:
    """Raises ValueError unless every array has exactly the shape `expected`.

    >>> check_shape((3,), scale=jnp.ones(3))
    """
    for name, array in arrays.items():
        if jnp.shape(array) != tuple(expected):
            raise ValueError(
                f"{name} must have shape {tuple(expected)}, got {tuple(jnp.shape(array))}"
            )


def check_broadcastable(shape: tuple[int, ...], /, **arrays: Any) -> None:
    """Raises ValueError unless every array broadcasts to `shape` without enlarging it.

    None passes: an absent mask broadcasts to anything.

    >>> check_broadcastable((4, 3), where=jnp.ones((4, 1), bool))
    """
    for name, array in arrays.items():
        if array is None:
            continue
        try:
            fits = np.broadcast_shapes(jnp.shape(array), shape) == tuple(shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} must broadcast to shape {tuple(shape)}, got {tuple(jnp.shape(array))}"
            )


def canonical_axes(
    axis: int | tuple[int, ...], ndim: int, *, name: str = "axis"
) -> tuple[int, ...]:
    """`axis` as a sorted tuple of distinct non-negative ints.

    Raises:
      ValueError: an axis is out of range, named twice, or the tuple is empty.

    >>> canonical_axes((-1, 0), 3)
    (0, 2)
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name} must name axes of an array with {ndim} dimensions, got {axis}")
    canonical = tuple(sorted(a % ndim for a in axes))
    if len(set(canonical)) != len(canonical):
        raise ValueError(f"{name} names the same axis twice: {axis}")
    return canonical


def check_same_tree(expected: Any, /, **trees: Any) -> None:
    """Raises ValueError unless every tree has the structure and the leaf shapes of `expected`.

    >>> check_same_tree({"w": jnp.ones(3)}, updates={"w": jnp.ones(2)})
    Traceback (most recent call last):
      ...
    ValueError: updates['w'] must have shape (3,), got (2,)
    """
    structure: Any = jax.tree.structure(expected)
    for name, tree in trees.items():
        if jax.tree.structure(tree) != structure:
            raise ValueError(
                f"{name} must have the tree structure {structure}, got {jax.tree.structure(tree)}"
            )
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), reference in zip(leaves, jax.tree.leaves(expected)):
            check_shape(jnp.shape(reference), **{name + jax.tree_util.keystr(path): leaf})


def check_attention_arguments(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any = None,
    mask: Any = None,
) -> None:
    """Raises unless the arguments of an attention function fit together.

    Raises:
      ValueError: shapes that do not match, or heads that the key/value heads do not divide.
      TypeError: `query`, `key`, `value` or `bias` not floating point, or a `mask` not boolean.

    >>> x = jnp.zeros((2, 5, 4, 8))
    >>> check_attention_arguments(x, x[:, :, :2], x[:, :, :2], mask=jnp.ones((5, 5), bool))
    """
    check_floating(query=query, key=key, value=value)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if jnp.ndim(array) != 4:
            raise ValueError(
                f"{name} must have shape [batch, length, heads, head_dim], got {jnp.shape(array)}"
            )
    batch, q_len, heads, head_dim = jnp.shape(query)
    _, k_len, kv_heads, _ = jnp.shape(key)
    check_shape((batch, k_len, kv_heads, head_dim), key=key)
    check_shape((batch, k_len, kv_heads, jnp.shape(value)[3]), value=value)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"key must have heads that divide the query's {heads}, got {kv_heads}")
    if k_len == 0:
        raise ValueError("key must have at least one position, got none")
    check_broadcastable((batch, heads, q_len, k_len), bias=bias, mask=mask)
    if bias is not None:
        check_floating(bias=bias)
    if mask is not None and jnp.result_type(mask) != jnp.bool_:
        raise TypeError(f"mask must be boolean, got {jnp.result_type(mask).name}")
