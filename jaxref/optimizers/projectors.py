"""Projectors: ways to split gradients into a small part, which gets moments, and the rest.

A projector works on a tree of arrays, or on one array; a basis P, redrawn from time to time, says
which part is which:

    low = P(g),     rest = g - Pᵀ(low),     join(low, rest) = Pᵀ(low) + rest

All shapes are static, so that the moments of `low` take only its memory. An array of more than two
dimensions is seen as the matrix nearest to a square that runs of its axes make: `[embed, heads,
head_dim]` as `[embed, heads · head_dim]`, `[heads, head_dim, embed]` as `[heads · head_dim,
embed]`, a convolution's `[3, 3, in, out]` as `[9 in, out]`. Arrays of fewer than two dimensions,
and those of which the density leaves nothing, are all rest; a scalar 0 stands for their `low`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.core.checks import check_interval
from jaxref.core.numerics import compute_dtype


class Projector(NamedTuple):
    """How `frugal` splits gradients.

    Attributes:
      draw: (key, turn, tree) → basis, of the gradients and the number of drawings before this one.
      split: (basis, tree) → (low, rest). `rest` has the gradients' shapes, and is 0 in all that
        `low` holds.
      join: (basis, low, rest) → tree, the inverse of `split`.

    `basis` and `low` are trees like the gradients, with one array for each of theirs; their types
    and shapes depend on the gradients' alone. `split` and `join` are linear, and `low` and `rest`
    keep the gradients' types.

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """

    draw: Callable[[Array, Any, Any], Any]
    split: Callable[[Any, Any], tuple[Any, Any]]
    join: Callable[[Any, Any, Any], Any]


def svd_projector(density: float = 0.25) -> Projector:
    r"""The leading singular vectors of the gradient, on the shorter side: GaLore's subspace.

        r ≥ c:  g = U S Vᵀ,  B = V_{:, :k},  low = g B [r, k],   Pᵀ(low) = low Bᵀ
        r < c:  g = U S Vᵀ,  A = U_{:, :k},  low = Aᵀ g [k, c],  Pᵀ(low) = A low

    with k = round(density min(r, c)) and the basis B or A of shape [min(r, c), k], in at least
    float32. An entry of the rest that is no more than the rounding error of its row (its column,
    r < c) is 0, so that a sign of it is not a step made of noise.

    Args:
      density: in [0, 1], the fraction of the space that `low` holds. Default 0.25.

    Returns:
      the `Projector`.

    Raises:
      ValueError: `density` is outside [0, 1].

    Use it where the gradients are nearly of low rank; `column_projector` costs next to nothing,
    `random_orthogonal_projector` no decomposition of the gradient.

    Cost: a singular value decomposition of each matrix at each drawing; three products with the
    basis a step, O(r c k) each.

    Example:
      >>> projector = svd_projector(0.5)
      >>> gradient = jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
      >>> basis = projector.draw(jax.random.key(0), 0, gradient)
      >>> low, rest = projector.split(basis, gradient)
      >>> print(low.shape, rest[:, 1])
      (3, 1) [0. 1. 0.]

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837; the subspace is that of
    Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024,
    arXiv:2403.03507.
    """

    def draw(key, matrix, rank):
        del key
        left, _, right = jnp.linalg.svd(_wide(matrix), full_matrices=False)
        return right[:rank].T if _is_tall(matrix) else left[:, :rank]

    return _leafwise(_rank_of_shorter_side(density), draw, _split_subspace, _join_subspace)


def random_orthogonal_projector(density: float = 0.25) -> Projector:
    r"""A random subspace of the shorter side, with an orthonormal basis.

    As `svd_projector`, with B or A uniform among the matrices with k orthonormal columns.

    Args:
      density: in [0, 1], the fraction of the space that `low` holds. Default 0.25.

    Returns:
      the `Projector`.

    Raises:
      ValueError: `density` is outside [0, 1].

    Use it in place of `svd_projector` where its decomposition is too slow or its subspace hardly
    changes from one drawing to the next.

    Cost: a QR factorization of a [min(r, c), k] matrix at each drawing; three products with the
    basis a step, O(r c k) each.

    Example:
      >>> projector = random_orthogonal_projector(0.5)
      >>> basis = projector.draw(jax.random.key(0), 0, jnp.ones((6, 4)))
      >>> print(jnp.allclose(basis.T @ basis, jnp.eye(2), atol=1e-5))
      True

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """

    def draw(key, matrix, rank):
        return jax.random.orthogonal(key, min(matrix.shape), (), compute_dtype(matrix), rank)

    return _leafwise(_rank_of_shorter_side(density), draw, _split_subspace, _join_subspace)


def column_projector(density: float = 0.25) -> Projector:
    r"""Random columns: low = g_{:, J} for int(density c) of the c columns.

    In a kernel `[in, out]` a column is what makes one output; in PyTorch's `[out, in]` that is a
    row, so that the authors' `columns` are the rows here, and the other way around.

    Args:
      density: in [0, 1], the fraction of the columns, rounded down. Default 0.25.

    Returns:
      the `Projector`. Its basis is J, int32.

    Raises:
      ValueError: `density` is outside [0, 1].

    Use it where `block_projector` is too coarse: it is the cheapest that divides every matrix.

    Cost: copies of the chosen columns, and one number for each as the basis; no products.

    Example:
      >>> projector = column_projector(0.5)
      >>> gradient = jnp.ones((2, 4))
      >>> basis = projector.draw(jax.random.key(0), 0, gradient)
      >>> low, rest = projector.split(basis, gradient)
      >>> print(low.shape, rest.sum(1))
      (2, 2) [2. 2.]

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """
    return _coordinates(density, lambda shape: shape[1], lambda index: (slice(None), index))


def row_projector(density: float = 0.25) -> Projector:
    r"""Random rows: low = g_{J, :} for int(density r) of the r rows.

    Args:
      density: in [0, 1], the fraction of the rows, rounded down. Default 0.25.

    Returns:
      the `Projector`. Its basis is J, int32.

    Raises:
      ValueError: `density` is outside [0, 1].

    Use it as `column_projector`, for the inputs of a kernel `[in, out]` in place of its outputs.

    Cost: copies of the chosen rows, and one number for each as the basis; no products.

    Example:
      >>> projector = row_projector(0.5)
      >>> gradient = jnp.ones((4, 2))
      >>> basis = projector.draw(jax.random.key(0), 0, gradient)
      >>> low, rest = projector.split(basis, gradient)
      >>> print(low.shape, rest.sum(0))
      (2, 2) [2. 2.]

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """
    return _coordinates(density, lambda shape: shape[0], lambda index: (index, slice(None)))


def random_coordinate_projector(density: float = 0.25) -> Projector:
    r"""Random entries, known as RandK: low = g_J for int(density r c) of the r c entries.

    Args:
      density: in [0, 1], the fraction of the entries, rounded down. Default 0.25.

    Returns:
      the `Projector`. `low` is a vector, and the basis J, int32, takes as much memory as a float32
      moment of it.

    Raises:
      ValueError: `density` is outside [0, 1].

    Use it for the finest choice of all; prefer `column_projector` for speed and for memory.

    Cost: scattered reads and writes, and as many int32 as `low` has entries; a permutation of r c
    numbers at each drawing.

    Example:
      >>> projector = random_coordinate_projector(0.5)
      >>> gradient = jnp.ones((2, 4))
      >>> basis = projector.draw(jax.random.key(0), 0, gradient)
      >>> low, rest = projector.split(basis, gradient)
      >>> print(low, rest.sum())
      [1. 1. 1. 1.] 4.0

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837.
    """
    return _coordinates(
        density, math.prod, lambda index: index, view=lambda matrix: jnp.reshape(matrix, -1)
    )


def block_projector(density: float = 0.25, order: str = "random") -> Projector:
    r"""Whole arrays: of n arrays of one shape, round(density n) are low, and at least one.

    The arrays of each shape, such as one kernel of all layers, take turns among themselves. That
    keeps shapes static: `low` has a slot for each active array, and no more. (The authors choose
    among all arrays alike, and allocate anew.) For n arrays of one shape, numbered from 0, and
    a of them active, turn t takes, mod n,

        random       a of them, uniformly
        ascending    t a, t a + 1, ..., t a + a - 1
        descending   n - 1 - t a, ..., n - t a - a
        mirror       t a/2, ..., t a/2 + a/2 - 1, mod ⌊n/2⌋, and n - 1 - i for each such i

    Args:
      density: in [0, 1], the fraction of the arrays. Default 0.25. With 0 none is low.
      order: "random", the default, "ascending", "descending" or "mirror". The order of the arrays
        is that of `jax.tree.leaves`.

    Returns:
      the `Projector`. `low` and the basis hold, in the place of the first arrays of each shape,
      the active arrays and their numbers.

    Raises:
      ValueError: `density` is outside [0, 1], or `order` is unknown; in use, an odd number of
        active arrays of one shape in mirror order.

    Use it first, as `frugal` does by default: the kernels keep their shapes. Prefer
    `column_projector` where every matrix should have moments for a part of itself.

    Cost: copies of the active arrays, and one number for each as the basis; no products.

    Example:
      >>> projector = block_projector(0.5, order="descending")
      >>> gradients = [jnp.ones((1, 2)), jnp.full((1, 2), 2.0)]
      >>> basis = projector.draw(jax.random.key(0), 0, gradients)
      >>> low, rest = projector.split(basis, gradients)
      >>> print(low[0], *rest)
      [[2. 2.]] [[1. 1.]] [[0. 0.]]

    Reference: Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by
    Reducing State Overhead for Scalable Training", 2024, arXiv:2411.07837; blocks are those of
    Luo, Yu, Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language
    Models", 2024, arXiv:2404.02827.
    """
    check_interval(0, 1, density=density)
    if order not in _ORDERS:
        raise ValueError(f"order must be one of {', '.join(_ORDERS)}, got {order!r}")

    def groups(leaves):
        """For each shape, the numbers of the leaves that have it, and how many are active."""
        members: dict[tuple, list[int]] = {}
        for number, x in enumerate(leaves):
            if jnp.ndim(x) >= 2:
                # Explicitly sharded arrays take turns with those that are sharded alike.
                kind = jnp.shape(x), jax.typeof(x).sharding
                members.setdefault(kind, []).append(number)
        for (shape, _), numbers in members.items() if density else ():
            active = max(1, round(density * len(numbers)))
            if order == "mirror" and active % 2:
                raise ValueError(
                    f"order must not be 'mirror' where the number of active arrays is odd: "
                    f"density {density} of {len(numbers)} arrays of shape {shape} makes {active}"
                )
            yield numbers, active

    def draw(key, turn, tree):
        leaves, structure = jax.tree.flatten(tree)
        basis = [jnp.zeros([], jnp.int32) for _ in leaves]
        for position, (numbers, active) in enumerate(groups(leaves)):
            drawn = jax.random.fold_in(key, position)
            chosen = _ORDERS[order](drawn, turn, len(numbers), active)
            for place, which in zip(numbers, jnp.asarray(chosen, jnp.int32)):
                basis[place] = which
        return jax.tree.unflatten(structure, basis)

    def split(basis, tree):
        leaves, structure = jax.tree.flatten(tree)
        basis = jax.tree.leaves(basis)
        low, rest = [jnp.zeros([], jnp.result_type(x)) for x in leaves], list(leaves)
        for numbers, active in groups(leaves):
            for place in numbers[:active]:
                # A switch copies the one that is asked for; a sum of masks would read them all.
                dtype = leaves[place].dtype
                copies = [lambda x=leaves[i], dtype=dtype: x.astype(dtype) for i in numbers]
                low[place] = jax.lax.switch(basis[place], copies)
            chosen = jnp.stack([basis[place] for place in numbers[:active]])
            for position, number in enumerate(numbers):
                is_active = jnp.any(chosen == position)
                rest[number] = jnp.where(is_active, 0, leaves[number])
        return jax.tree.unflatten(structure, low), jax.tree.unflatten(structure, rest)

    def join(basis, low, rest):
        leaves, structure = jax.tree.flatten(rest)
        basis, low = jax.tree.leaves(basis), jax.tree.leaves(low)
        for numbers, active in groups(leaves):
            chosen = jnp.stack([basis[place] for place in numbers[:active]])
            slots = jnp.stack([low[place] for place in numbers[:active]])
            for position, number in enumerate(numbers):
                here = chosen == position
                slot = slots[jnp.argmax(here)].astype(leaves[number].dtype)
                leaves[number] = jnp.where(jnp.any(here), slot, leaves[number])
        return jax.tree.unflatten(structure, leaves)

    return Projector(draw, split, join)


def _mirror(key, turn, count, active):
    del key
    half = (turn * (active // 2) + jnp.arange(active // 2)) % (count // 2)
    return jnp.concatenate([half, count - 1 - half])


_ORDERS: dict[str, Callable[[Array, Any, int, int], Array]] = {
    "random": lambda key, turn, count, active: jax.random.permutation(key, count)[:active],
    "ascending": lambda key, turn, count, active: (turn * active + jnp.arange(active)) % count,
    "descending": lambda key, turn, count, active: (
        (count - 1 - turn * active - jnp.arange(active)) % count
    ),
    "mirror": _mirror,
}


def _leafwise(rank, draw, split, join):
    """The projector that treats each array on its own, as a matrix, where rank(its shape) > 0."""

    def rank_of(x):
        return rank(_matrix_shape(x.shape)) if jnp.ndim(x) >= 2 else 0

    def draw_tree(key, turn, tree):
        del turn
        leaves, structure = jax.tree.flatten(tree)
        basis = [
            draw(jax.random.fold_in(key, number), _matrix(x), rank_of(x))
            if rank_of(x)
            else jnp.zeros([], jnp.int32)
            for number, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, basis)

    def split_leaf(basis, x):
        if not rank_of(x):
            return jnp.zeros([], x.dtype), x
        low, rest = split(basis, _matrix(x))
        return low.astype(x.dtype), _like(rest, x)

    def split_tree(basis, tree):
        leaves, structure = jax.tree.flatten(tree)
        low, rest = zip(*map(split_leaf, jax.tree.leaves(basis), leaves)) if leaves else ((), ())
        return jax.tree.unflatten(structure, low), jax.tree.unflatten(structure, rest)

    def join_leaf(rest, basis, low):
        if not rank_of(rest):
            return rest
        return _like(join(basis, low, _matrix(rest)), rest)

    return Projector(
        draw_tree, split_tree, lambda basis, low, rest: jax.tree.map(join_leaf, rest, basis, low)
    )


def _coordinates(density, count, at, view=lambda matrix: matrix):
    """Random ones of the count(shape) parts of a matrix, found at(index) in a view of it."""
    check_interval(0, 1, density=density)

    def draw(key, matrix, rank):
        return jax.random.permutation(key, count(matrix.shape))[:rank].astype(jnp.int32)

    def split(basis, matrix):
        low = view(matrix)[at(basis)]
        return low, join(basis, jnp.zeros_like(low), matrix)

    def join(basis, low, rest):
        return view(rest).at[at(basis)].set(low, unique_indices=True).reshape(rest.shape)

    return _leafwise(lambda shape: int(density * count(shape)), draw, split, join)


def _rank_of_shorter_side(density):
    check_interval(0, 1, density=density)
    return lambda shape: round(density * min(shape))


def _split_subspace(basis, matrix):
    """The part in the basis of the shorter side, and what is at right angles to it."""
    g, is_tall = _wide(matrix), _is_tall(matrix)
    low = _product(g, basis) if is_tall else _product(basis.T, g)
    if basis.shape[0] == basis.shape[1]:
        return low, jnp.zeros_like(g)
    rest = g - (_product(low, basis.T) if is_tall else _product(basis, low))
    error = 16 * jnp.finfo(g.dtype).eps * jnp.linalg.norm(g, axis=int(is_tall), keepdims=True)
    return low, jnp.where(jnp.abs(rest) > error, rest, 0)


def _join_subspace(basis, low, rest):
    low = _wide(low)
    return rest + (_product(low, basis.T) if _is_tall(rest) else _product(basis, low))


def _product(a, b):
    """In full precision: what a fast product rounds off would be taken for a part of the rest."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _is_tall(matrix):
    return matrix.shape[0] >= matrix.shape[1]


def _wide(x):
    return x.astype(compute_dtype(x))


def _matrix(x):
    """The array as a matrix, and whole, where it was explicitly sharded."""
    sharding = jax.typeof(x).sharding
    if any(sharding.spec):
        x = jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return jnp.reshape(x, _matrix_shape(x.shape))


def _like(matrix, x):
    """The matrix with the shape, the type and the sharding of the array that it was."""
    sharding = jax.typeof(x).sharding
    y = matrix.astype(x.dtype).reshape(x.shape)
    return jax.reshard(y, sharding) if any(sharding.spec) else y


def _matrix_shape(shape):
    """The nearest to a square among the matrices that runs of the axes make; ties: the tallest."""
    candidates = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return min(reversed(candidates), key=max)
