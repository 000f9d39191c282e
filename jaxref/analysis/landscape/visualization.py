"""Pictures of the loss around a model and along its training, that can be compared."""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from jaxref.analysis.landscape.lanczos import stochastic_lanczos
from jaxref.core.checks import canonical_axes, check_floating, check_interval, check_same_tree
from jaxref.core.figures import new_axes
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import unit_vectors

_NORMALIZATIONS = ("filter", "layer", "weight", "none")


def random_direction(
    params: Any,
    key: Array,
    *,
    normalization: Literal["filter", "layer", "weight", "none"] = "filter",
    ignore_vectors: bool = True,
    filter_axes: int | tuple[int, ...] = -1,
) -> Any:
    r"""A random direction with the size of the parameters, filter by filter.

        filter:  d_f = ‖θ_f‖ z_f / ‖z_f‖          layer:  d = ‖θ‖ z / ‖z‖
        weight:  d = |θ| z, elementwise           none:   d = z,         z ~ N(0, 1)

    for each array θ with two axes or more; a filter θ_f is all that makes one output channel: a
    column of a dense kernel `[in, out]`, `kernel[..., c]` of a convolution.

    Args:
      params: tree of floating-point arrays θ.
      key: random key. The same key gives models of the same shapes the same z.
      normalization: "filter" (default), "layer", "weight" or "none", as above.
      ignore_vectors: whether arrays with fewer than two axes (biases, scales of norms) stay where
        they are, d = 0. Default True. Otherwise d = θ there, as in the authors' code, and d = z
        with "none".
      filter_axes: the output axes of an array, an axis or several. Default -1, the layout of jax;
        0 for arrays of PyTorch, (-2, -1) for kernels `[in, heads, head_dim]`.

    Returns:
      d, a tree like `params`, in at least float32. A filter of zeros has d = 0.

    Raises:
      ValueError: an unknown `normalization`, or `filter_axes` that an array does not have.
      TypeError: parameters that are not floating point.

    Use it with `loss_line` and `loss_plane`, and with "filter" wherever two models are compared: a
    ReLU network that has one layer scaled by c and the next by 1/c is the same function, and looks
    flat or sharp along "none". "weight" alone also withstands a scale for each single neuron, and
    its undoing in the rows of the next layer.

    Cost: time and memory of one normal draw for each parameter; no evaluation of the model.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.1]]), "bias": jnp.ones(2)}
      >>> d = random_direction(params, jax.random.key(0))
      >>> print(*(f"{x:.2f}" for x in jnp.linalg.norm(d["kernel"], axis=0)), d["bias"])
      5.00 0.10 [0. 0.]

    Reference: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
    2017, arXiv:1712.09913.
    """
    if normalization not in _NORMALIZATIONS:
        raise ValueError(
            f"normalization must be one of {', '.join(_NORMALIZATIONS)}, got {normalization!r}"
        )
    _check_params(params)

    def normalized(theta: Array, z: Array) -> Array:
        if theta.ndim < 2:
            if ignore_vectors:
                return jnp.zeros_like(z)
            return z if normalization == "none" else theta
        if normalization == "none":
            return z
        if normalization == "weight":
            return jnp.abs(theta) * z
        if normalization == "layer":
            return _of_equal_length(z.reshape(-1), theta.reshape(-1)).reshape(theta.shape)
        axes = canonical_axes(filter_axes, theta.ndim, name="filter_axes")
        first = range(len(axes))
        z, filters = (jnp.moveaxis(x, axes, first) for x in (z, theta))
        shape = filters.shape
        z, filters = (x.reshape(*shape[: len(axes)], -1) for x in (z, filters))
        return jnp.moveaxis(_of_equal_length(z, filters).reshape(shape), first, axes)

    theta = jax.tree.map(lambda w: jnp.asarray(w, compute_dtype(w)), params)
    return jax.tree.map(normalized, theta, optax.tree.random_like(key, theta))


def loss_line(
    loss_fn: Callable[[Any], Array],
    params: Any,
    direction: Any,
    alphas: ArrayLike,
    *,
    chunk: int = 1,
) -> Array:
    r"""The loss along a line through the parameters.

        f(α) = L(θ + α d)

    Args:
      loss_fn: params ↦ L, a scalar, on one batch or a whole set. What it takes besides, such as
        the running statistics of batch normalisation, stays as it is unless it is computed inside.
      params: θ, tree of floating-point arrays.
      direction: d, a tree of the same structure and shapes: from `random_direction`, or the
        difference to another model's parameters.
      alphas: α `[n]`; usually 51 values from -1 to 1.
      chunk: points that are evaluated at once, at least 1. Default 1.

    Returns:
      f `[n]`, in the type of the loss; L(θ) itself at α = 0. θ + α d is computed in at least
      float32 and rounded to the type of θ.

    Raises:
      ValueError: a direction unlike `params`, `alphas` without exactly one axis, or a `chunk` out
        of range.
      TypeError: parameters that are not floating point.

    Use it to compare how wide minima are, over several keys. Along the difference to another model
    it shows whether there is a barrier, but not which end is the sharper. For several models, one
    `jax.jit` around it compiles it once. `loss_plane` shows more of one model.

    Cost: n evaluations of L; memory of `chunk` of them with as many copies of the parameters.

    Example:
      >>> loss = lambda w: jnp.sum(w**2)
      >>> print(loss_line(loss, jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]), [-1.0, 0.0, 0.5]))
      [5. 1. 2.]

    Reference: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
    2017, arXiv:1712.09913.
    """
    check_same_tree(params, direction=direction)
    return _losses(loss_fn, params, (direction,), (_coordinates(alphas=alphas),), chunk)


class LandscapeGrid(NamedTuple):
    """The loss on a plane of parameters, by `loss_plane`.

    Attributes:
      alphas: α `[n]`, the coordinates along `d1`.
      betas: β `[m]`, those along `d2`.
      losses: f(α_i, β_j) `[n, m]`.
      d1, d2: trees, the directions of α and of β.
    """

    alphas: Array
    betas: Array
    losses: Array
    d1: Any
    d2: Any


def loss_plane(
    loss_fn: Callable[[Any], Array],
    params: Any,
    d1: Any,
    d2: Any,
    alphas: ArrayLike,
    betas: ArrayLike,
    *,
    chunk: int = 1,
) -> LandscapeGrid:
    r"""The loss on a plane through the parameters.

        f(α, β) = L(θ + α d_1 + β d_2)

    Args:
      loss_fn: params ↦ L, a scalar, as of `loss_line`.
      params: θ, tree of floating-point arrays.
      d1: d_1, a tree of the same structure and shapes, from `random_direction` or
        `trajectory_pca_directions`.
      d2: d_2, another. Two random ones are nearly orthogonal: of P parameters, |cos| ≈ √(2/(π P)).
      alphas: α `[n]`; usually 51 values from -1 to 1.
      betas: β `[m]`.
      chunk: points that are evaluated at once, at least 1. Default 1.

    Returns:
      A `LandscapeGrid`.

    Raises:
      ValueError: directions unlike `params`, coordinates without exactly one axis, or a `chunk`
        out of range.
      TypeError: parameters that are not floating point.

    Use it for the picture of one model, with `plot_landscape`. Of millions of directions it has
    two: one that is not convex proves that the loss is not, a bowl proves nothing, and
    `curvature_ratio` asks them all.

    Cost: n m evaluations of L; memory of `chunk` of them with as many copies of the parameters.

    Example:
      >>> loss = lambda w: w[0] ** 2 + 3 * w[1] ** 2
      >>> x, y = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> print(loss_plane(loss, jnp.zeros(2), x, y, [0.0, 1.0], [0.0, 2.0]).losses)
      [[ 0. 12.]
       [ 1. 13.]]

    Reference: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
    2017, arXiv:1712.09913.
    """
    check_same_tree(params, d1=d1, d2=d2)
    a, b = _coordinates(alphas=alphas), _coordinates(betas=betas)
    points = tuple(x.reshape(-1) for x in jnp.meshgrid(a, b, indexing="ij"))
    losses = _losses(loss_fn, params, (d1, d2), points, chunk)
    return LandscapeGrid(a, b, losses.reshape(a.size, b.size), d1, d2)


class TrajectoryPlane(NamedTuple):
    """The plane in which a path of parameters mostly lies, by `trajectory_pca_directions`.

    Attributes:
      d1: tree of length 1, the direction of the largest spread.
      d2: tree of length 1, orthogonal to `d1`.
      explained: the shares of the spread along the two `[2]`.
      coordinates: of the checkpoints on the plane, `[n, 2]`; the final parameters are at 0.
    """

    d1: Any
    d2: Any
    explained: Array
    coordinates: Array


def trajectory_pca_directions(
    checkpoints: Any, final: Any, *, center: bool = True
) -> TrajectoryPlane:
    r"""The two directions in which parameters moved most while training.

        M = [θ_0 - θ_n ; ... ; θ_{n-1} - θ_n],   less the mean of its rows
        d_1, d_2 = its right singular vectors with the largest σ,   explained_k = σ_k² / Σ_i σ_i²
        coordinates_ik = (θ_i - θ_n) · d_k

    Args:
      checkpoints: θ_0 ... θ_{n-1}, a tree like `final` whose leaves have an axis `[n]` in front,
        at least two; the final parameters may be among them. `jax.lax.scan` gives such a tree;
        `jax.tree.map(lambda *x: jnp.stack(x), *trees)` makes one.
      final: θ_n, tree of floating-point arrays.
      center: whether the mean is taken out of the rows, as PCA does and the authors' code with it.
        Default True. False gives the plane through θ_n that is nearest to the checkpoints.

    Returns:
      A `TrajectoryPlane` in at least float32; the first checkpoint has no negative coordinate. A
      direction with nothing left, the second of a straight path, is 0 or what rounding leaves.

    Raises:
      ValueError: fewer than two checkpoints, or trees that do not match.
      TypeError: parameters that are not floating point.

    Use it to draw a path on the loss around its end: `coordinates` over `loss_plane(loss_fn, final,
    d1, d2, ...)`. Along random directions, to which its steps are nearly orthogonal, a path hardly
    moves. Large shares alone say little: a random walk has them, too.

    Cost: time O(n² P) for P parameters, memory of three copies of the checkpoints; no evaluation of
    the model.

    Example:
      >>> path = jnp.array([[4.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
      >>> plane = trajectory_pca_directions(path, jnp.zeros(3), center=False)
      >>> print(*(f"{share:.3f}" for share in plane.explained))
      0.919 0.081

    Reference: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
    2017, arXiv:1712.09913.
    """
    _check_params(final, "final")
    counts = {jnp.shape(w)[:1] for w in jax.tree.leaves(checkpoints)}
    if len(counts) != 1 or min(counts) < (2,):
        raise ValueError(f"checkpoints must have one first axis of 2 or more, got {sorted(counts)}")
    (n,) = counts.pop()
    stack = jax.tree.map(lambda w: np.broadcast_to(0.0, (n, *jnp.shape(w))), final)
    check_same_tree(stack, checkpoints=checkpoints)

    def moved(checkpoint: ArrayLike, final: ArrayLike) -> Array:
        dtype = compute_dtype(checkpoint, final)
        return jnp.asarray(checkpoint, dtype) - jnp.asarray(final, dtype)

    path = jax.tree.map(moved, checkpoints, final)
    rows = jax.tree.map(lambda m: m - jnp.mean(m, axis=0), path) if center else path
    total = optax.tree.norm(rows, squared=True)
    d1, square1 = _longest_direction(rows)
    for _ in range(2):  # what rounding leaves after the first is gone after the second
        rest = _along(rows, d1)
        rows = jax.tree.map(lambda m, d, rest=rest: m - jnp.multiply.outer(rest, d), rows, d1)
    d2, square2 = _longest_direction(rows)
    coordinates = jnp.stack([_along(path, d1), _along(path, d2)], axis=1)
    signs = jnp.where(coordinates[0] < 0, -1, 1)
    d1, d2 = (jax.tree.map(lambda d, sign=sign: sign * d, d) for d, sign in zip((d1, d2), signs))
    explained = jnp.stack([square1, square2]) / jnp.where(total > 0, total, 1.0)
    return TrajectoryPlane(d1, d2, explained, signs * coordinates)


class CurvatureRatio(NamedTuple):
    """How far a loss is from convex at a point, by `curvature_ratio`.

    Attributes:
      lambda_max: the largest eigenvalue of the Hessian.
      lambda_min: the least.
      ratio: |lambda_min / lambda_max|.
    """

    lambda_max: Array
    lambda_min: Array
    ratio: Array


def curvature_ratio(
    hvp: Callable[[Any], Any], params: Any, *, num_steps: int = 32, key: Array
) -> CurvatureRatio:
    r"""The least over the largest eigenvalue of the Hessian: where a loss is not convex.

        |λ_min / λ_max|

    Args:
      hvp: v ↦ H v, linear, from and to trees like `params`. For a loss at θ:
        `lambda v: jax.jvp(jax.grad(loss), (theta,), (v,))[1]`.
      params: tree of floating-point arrays; only its shapes and types matter.
      num_steps: Lanczos steps, at least 1. Default 32. The extremes are the outermost nodes of
        `stochastic_lanczos`, and so at most as far apart as the eigenvalues are.
      key: random key of the vector to start from.

    Returns:
      A `CurvatureRatio` of scalars in at least float32; the ratio is 0 for H = 0, and infinite or
      very large where λ_max alone is 0.

    Raises:
      ValueError: `num_steps` out of range, no parameters, or a result of `hvp` that is not like
        `params`.
      TypeError: parameters that are not floating point.

    Use it at points of `loss_plane`: where the picture shows a bowl and the ratio is small, the
    loss is nearly convex in all directions. Where λ_min > 0 it is convex, and the ratio
    the inverse of the condition number.

    Cost: m = `num_steps` products H v, each about two gradients; memory of m + 1 copies of the
    parameters.

    Example:
      >>> hvp = lambda v: jnp.array([4.0, 1.0, -1.0]) * v
      >>> curvature = curvature_ratio(hvp, jnp.zeros(3), key=jax.random.key(0))
      >>> print(*(f"{x:.2f}" for x in curvature))
      4.00 -1.00 0.25

    Reference: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
    2017, arXiv:1712.09913.
    """
    spectrum = stochastic_lanczos(hvp, params, num_steps=num_steps, key=key)
    high, low = spectrum.ritz_max, spectrum.ritz_min
    is_zero = (high == 0) & (low == 0)
    ratio = jnp.abs(low / jnp.where(is_zero, 1.0, high))
    return CurvatureRatio(high, low, ratio)


def plot_landscape(
    grid: LandscapeGrid,
    kind: Literal["contour", "surface"] = "contour",
    *,
    levels: int | ArrayLike = 20,
    ax: Any = None,
) -> Any:
    """Draws the loss on a plane, as lines of equal loss or as a surface.

    Args:
      grid: from `loss_plane`, with at least two coordinates along both directions.
      kind: "contour" (default) or "surface".
      levels: for "contour", how many lines there are about, or the losses they stand for,
        ascending. Default 20. The same losses make pictures of several models comparable.
      ax: matplotlib axes, for "surface" with projection "3d". Default: those of a new figure.

    Returns:
      The axes; points that are not finite are left out.

    Raises:
      ValueError: an unknown `kind`, a grid with fewer than two coordinates or no finite loss, or
        flat axes for a surface.

    Use it with `kind="contour"` to read off numbers, and for paths: `ax.plot(*coordinates.T)` draws
    that of `trajectory_pca_directions`.

    Cost: the time of the drawing, with n m points; no evaluation of the model.

    Example:
      >>> x, y = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> t = jnp.linspace(-1, 1, 9)
      >>> grid = loss_plane(lambda w: jnp.sum(w**2), jnp.zeros(2), x, y, t, t)
      >>> plot_landscape(grid).get_xlabel()
      'α'

    Reference: Li, Xu, Taylor, Studer, Goldstein, "Visualizing the Loss Landscape of Neural Nets",
    2017, arXiv:1712.09913.
    """
    if kind not in ("contour", "surface"):
        raise ValueError(f"kind must be 'contour' or 'surface', got {kind!r}")
    a, b, losses = (np.asarray(x, np.float64) for x in grid[:3])
    finite = np.isfinite(losses)
    if min(losses.shape) < 2 or not np.any(finite):
        got = f"{losses.shape}, {np.sum(finite)} of them finite"
        raise ValueError(f"grid must have finite losses, two or more each way, got {got}")
    if kind == "contour":
        ax = new_axes() if ax is None else ax
        _draw_contours(ax, a, b, np.ma.masked_where(~finite, losses).T, np.asarray(levels))
    else:
        if ax is None:
            figure = new_axes().figure
            figure.clear()
            ax = figure.add_subplot(projection="3d")
        if ax.name != "3d":
            raise ValueError("ax must have projection '3d' for a surface")
        ax.plot_surface(*np.meshgrid(a, b), np.where(finite, losses, np.nan).T, cmap="viridis")
        ax.set_zlabel("loss")
    ax.set_xlabel("α")
    ax.set_ylabel("β")
    return ax


def _check_params(params: Any, name: str = "params") -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        check_floating(**{name + jax.tree_util.keystr(path): leaf})


def _coordinates(**coordinates: ArrayLike) -> Array:
    """The one array, once it has one axis."""
    ((name, values),) = coordinates.items()
    values = jnp.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {values.shape}")
    return values.astype(compute_dtype(values))


def _losses(
    loss_fn: Callable[[Any], Array],
    params: Any,
    directions: tuple[Any, ...],
    points: tuple[Array, ...],
    chunk: int,
) -> Array:
    """L(θ + Σ α d) at each point, α being its coordinates; the sum is rounded once."""
    _check_params(params)
    check_interval(1, jnp.inf, chunk=chunk)

    def loss_at(point: tuple[Array, ...]) -> Array:
        def moved(theta: ArrayLike, *ds: ArrayLike) -> Array:
            dtype = compute_dtype(theta, *ds)
            terms = (a.astype(dtype) * jnp.asarray(d, dtype) for a, d in zip(point, ds))
            return sum(terms, start=jnp.asarray(theta, dtype)).astype(jnp.result_type(theta))

        return loss_fn(jax.tree.map(moved, params, *directions))

    return lax.map(loss_at, points, batch_size=chunk if chunk > 1 else None)


def _of_equal_length(z: Array, theta: Array) -> Array:
    """The vectors z at the last axis, as long as those of θ."""
    return unit_vectors(z) * jnp.sum(theta * unit_vectors(theta), axis=-1, keepdims=True)


def _along(rows: Any, direction: Any) -> Array:
    """The products `[n]` of the rows with a direction."""
    products = jax.tree.map(
        lambda m, d: jnp.tensordot(m, d, d.ndim, precision=lax.Precision.HIGHEST), rows, direction
    )
    return reduce(add, jax.tree.leaves(products))


def _longest_direction(rows: Any) -> tuple[Any, Array]:
    """The first right singular vector, and the square of its singular value."""

    def gram(m: Array) -> Array:
        m = m.reshape(m.shape[0], -1)
        return jnp.dot(m, m.T, precision=lax.Precision.HIGHEST)

    squares, vectors = jnp.linalg.eigh(reduce(add, map(gram, jax.tree.leaves(rows))))
    square = jnp.maximum(squares[-1], 0.0)
    u = vectors[:, -1] * jnp.where(square > 0, lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return jax.tree.map(
        lambda m: jnp.tensordot(u, m, 1, precision=lax.Precision.HIGHEST), rows
    ), square


def _draw_contours(ax: Any, a: np.ndarray, b: np.ndarray, losses: Any, levels: np.ndarray) -> None:
    """Lines in colours that tell levels apart even where these are decades."""
    from matplotlib import colormaps, ticker

    if levels.ndim == 0:
        ticks = ticker.MaxNLocator(int(levels)).tick_values(losses.min(), losses.max())
        levels = np.asarray(ticks)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(levels)))
    ax.clabel(ax.contour(a, b, losses, levels=levels, colors=colors), fontsize=8, fmt="%g")
