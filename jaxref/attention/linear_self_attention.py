"""Linear self-attention as an in-context learner, and the predictors it is compared with."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype


def linear_self_attention(
    tokens: ArrayLike,
    w_query: ArrayLike,
    w_key: ArrayLike,
    w_value: ArrayLike,
    *,
    mask_query: bool = True,
) -> Array:
    r"""The query token after one layer of self-attention without softmax.

    With the tokens v_1 ... v_n of the examples and v_{n+1} of the query,

        v_{n+1} + W_V Σ_{j ≤ n} v_j (v_jᵀ W_Kᵀ W_Q v_{n+1})

    There is no factor 1/n: the weights absorb it. On tokens v_j = (x_j, y_j) and
    v_{n+1} = (x_q, 0) the last entry, or any readout hᵀ of the result, predicts y_q.

    Args:
      tokens: `[..., n + 1, size]` floating point, the query last; size is d + 1 for examples of d
        features. `jaxref.data.InContextPrompts.tokens` has them so.
      w_query, w_key: W_Q and W_K `[key_size, size]`.
      w_value: W_V `[size, size]`.
      mask_query: leave the query itself out of the sum. Default True, the paper's; the examples
        never see the query either, so that only its token is computed.

    Returns:
      The token `[..., size]` in the type of `tokens`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match, or no example.
      TypeError: an argument that is not floating point.

    Use it to study what attention learns in context; `linear_attention` is the layer to build
    models from.

    Cost: O(n size + size²) a prompt: of the layer's tokens only that of the query is computed.

    Example:
      >>> weights = gradient_descent_attention_weights(1, 0.5)
      >>> tokens = jnp.array([[1.0, 2.0], [3.0, 6.0], [2.0, 0.0]])  # y = 2 x, asked at x = 2
      >>> print(linear_self_attention(tokens, *weights[:3]))
      [ 2. 20.]

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """
    check_floating(tokens=tokens, w_query=w_query, w_key=w_key, w_value=w_value)
    if jnp.ndim(tokens) < 2 or jnp.shape(tokens)[-2] < 2:
        raise ValueError(
            f"tokens must have shape [..., 1 or more examples and the query, size], "
            f"got {tuple(jnp.shape(tokens))}"
        )
    size = jnp.shape(tokens)[-1]
    if jnp.ndim(w_query) != 2:
        raise ValueError(
            f"w_query must have shape [key_size, size], got {tuple(jnp.shape(w_query))}"
        )
    check_shape((jnp.shape(w_query)[0], size), w_query=w_query, w_key=w_key)
    check_shape((size, size), w_value=w_value)
    tokens, w_query, w_key, w_value = map(jnp.asarray, (tokens, w_query, w_key, w_value))
    wide = tokens.astype(compute_dtype(tokens))
    query = wide[..., -1, :]
    seen = wide[..., :-1, :] if mask_query else wide
    scores = jnp.einsum("...js,...s->...j", seen, (query @ w_query.T) @ w_key)
    attended = jnp.einsum("...j,...js->...s", scores, seen)
    return (query + attended @ w_value.T).astype(tokens.dtype)


def gradient_descent_attention_weights(
    dimension: int, step_size: ArrayLike, preconditioner: ArrayLike | None = None
) -> tuple[Array, Array, Array, Array]:
    r"""Weights with which linear self-attention takes one step of gradient descent in context.

        W_Kᵀ W_Q = [[M, 0], [0, 0]],   hᵀ W_V = η e_{d+1}ᵀ

    so that hᵀ of the query token after the layer is η Σ_i y_i x_iᵀ M x_q, what
    `one_step_gradient_descent_predictor` predicts.

    Args:
      dimension: d, the number of features of an example, at least 1.
      step_size: η, a number.
      preconditioner: M `[d, d]` floating point. Default: the identity.

    Returns:
      W_Q, W_K and W_V `[d + 1, d + 1]`, and the readout h `[d + 1]`, in at least float32.

    Raises:
      ValueError: a `dimension` below 1, or M or η of another shape.
      TypeError: M is not floating point.

    Use it as the optimum that trained weights are compared with: of those, only the products
    W_Kᵀ W_Q and hᵀ W_V are determined, up to a factor between them.

    Cost: three matrices [d + 1, d + 1], once.

    Example:
      >>> w_query, w_key, w_value, readout = gradient_descent_attention_weights(1, 0.5)
      >>> print(readout @ w_value)
      [0.  0.5]

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """
    check_interval(1, jnp.inf, dimension=dimension)
    check_shape((), step_size=step_size)
    if preconditioner is None:
        preconditioner = jnp.eye(dimension)
    check_floating(preconditioner=preconditioner)
    check_shape((dimension, dimension), preconditioner=preconditioner)
    dtype = compute_dtype(preconditioner)
    w_query = jnp.zeros((dimension + 1, dimension + 1), dtype).at[:-1, :-1].set(preconditioner)
    w_value = jnp.zeros_like(w_query).at[-1, -1].set(step_size)
    readout = jnp.zeros(dimension + 1, dtype).at[-1].set(1)
    return w_query, jnp.eye(dimension + 1, dtype=dtype), w_value, readout


def one_step_gradient_descent_predictor(
    x: ArrayLike,
    y: ArrayLike,
    x_query: ArrayLike,
    step_size: ArrayLike,
    preconditioner: ArrayLike | None = None,
) -> Array:
    r"""Prediction of a linear model after one step of gradient descent from zero weights.

    On the loss ½ Σ_i (w · x_i - y_i)² of the n examples of a prompt,

        ŷ = w · M x_q,   w = η Σ_i y_i x_i

    Args:
      x: `[..., n, d]` floating point, n at least 1.
      y: `[..., n]` floating point.
      x_query: `[..., d]` floating point.
      step_size: η, a number; `optimal_in_context_step_size` has the best one.
      preconditioner: M `[d, d]`, which makes it a step of preconditioned descent. Default: the
        identity.

    Returns:
      ŷ `[...]` in the type of `x`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match, or no example.
      TypeError: an array that is not floating point.

    Use it as what one layer of linear self-attention can do at best: for x of covariance Σ and
    weights of covariance Σ⁻¹ with M = Σ⁻¹. `ridge_predictor` is the best of all predictors.

    Cost: O(n d) a prompt, and d² more with a preconditioner.

    Example:
      >>> x, y = jnp.array([[1.0], [3.0]]), jnp.array([2.0, 6.0])
      >>> print(one_step_gradient_descent_predictor(x, y, jnp.array([2.0]), 0.1))
      4.0

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """
    x, y, x_query = _check_prompt(x, y, x_query)
    check_shape((), step_size=step_size)
    dtype = compute_dtype(x)
    direction = x_query.astype(dtype)
    if preconditioner is not None:
        check_floating(preconditioner=preconditioner)
        check_shape((x.shape[-1],) * 2, preconditioner=preconditioner)
        direction = jnp.einsum("de,...e->...d", preconditioner, direction)
    weights = step_size * jnp.einsum("...n,...nd->...d", y.astype(dtype), x.astype(dtype))
    return jnp.sum(weights * direction, axis=-1).astype(x.dtype)


def optimal_in_context_step_size(
    num_examples: ArrayLike, dimension: ArrayLike, noise_variance: ArrayLike = 0.0
) -> Array:
    r"""The step size with which one step of gradient descent predicts best, in the mean square.

        η = 1 / (n + d + 1 + σ²)

    for x ~ N(0, I_d), w ~ N(0, I_d) and y = w · x + N(0, σ²), and for x ~ N(0, Σ), w ~ N(0, Σ⁻¹)
    with the preconditioner Σ⁻¹. The mean square error of noiseless targets is then
    d - n d / (n + d + 1 + σ²).

    Args:
      num_examples: n, at least 1.
      dimension: d, at least 1.
      noise_variance: σ², at least 0. Default 0.

    Returns:
      η, in at least float32.

    Raises:
      ValueError: an argument out of its range.

    Use it for the step of `one_step_gradient_descent_predictor` where this is the data's law;
    for others it is E[w · Xᵀy] / E‖Xᵀy‖², w the best linear fit, to be estimated from samples.

    Cost: one formula.

    Example:
      >>> print(optimal_in_context_step_size(10, 4))
      0.0667

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """
    check_interval(1, jnp.inf, num_examples=num_examples, dimension=dimension)
    check_interval(0, jnp.inf, noise_variance=noise_variance)
    return 1 / (jnp.asarray(noise_variance, float) + num_examples + dimension + 1)


def ridge_predictor(
    x: ArrayLike, y: ArrayLike, x_query: ArrayLike, noise_variance: ArrayLike
) -> Array:
    r"""Prediction of ridge regression on the examples of a prompt.

        ŷ = w · x_q,   w = argmin_w Σ_i (w · x_i - y_i)² + σ² ‖w‖² = (XᵀX + σ² I)⁻¹ Xᵀ y

    For weights drawn from N(0, I) and targets with noise of variance σ² it is the posterior mean,
    with the smallest mean square error of all predictors.

    Args:
      x: `[..., n, d]` floating point, n at least 1.
      y: `[..., n]` floating point.
      x_query: `[..., d]` floating point.
      noise_variance: σ², at least 0. The number 0 gives the least-squares fit, of least norm where
        the examples leave it open.

    Returns:
      ŷ `[...]` in the type of `x`, computed in at least float32.

    Raises:
      ValueError: shapes that do not match, no example, or a negative `noise_variance`.
      TypeError: an array that is not floating point.

    Use it as the bound of what is to be learnt in context;
    `one_step_gradient_descent_predictor` is what one layer of linear attention attains of it.

    Cost: a linear system of size min(n, d), O(n d min(n, d)) a prompt; a pseudo-inverse where σ² is
    the number 0.

    Example:
      >>> x, y = jnp.array([[1.0], [3.0]]), jnp.array([2.0, 6.0])
      >>> print(ridge_predictor(x, y, jnp.array([2.0]), 0.0))
      4.0

    Reference: Mahankali, Hashimoto, Ma, "One Step of Gradient Descent is Provably the Optimal
    In-Context Learner with One Layer of Linear Self-Attention", 2023, arXiv:2307.03576.
    """
    x, y, x_query = _check_prompt(x, y, x_query)
    check_shape((), noise_variance=noise_variance)
    check_interval(0, jnp.inf, noise_variance=noise_variance)
    dtype = compute_dtype(x)
    wide, targets = x.astype(dtype), y.astype(dtype)[..., None]
    transposed = jnp.swapaxes(wide, -1, -2)
    examples, dimension = wide.shape[-2:]
    if not isinstance(noise_variance, jax.core.Tracer) and noise_variance == 0:
        weights = jnp.linalg.pinv(wide) @ targets
    elif examples < dimension:  # w = Xᵀ (XXᵀ + σ² I)⁻¹ y, the smaller system
        gram = wide @ transposed + noise_variance * jnp.eye(examples)
        weights = transposed @ jnp.linalg.solve(gram, targets)
    else:
        gram = transposed @ wide + noise_variance * jnp.eye(dimension)
        weights = jnp.linalg.solve(gram, transposed @ targets)
    return jnp.sum(weights[..., 0] * x_query, axis=-1).astype(x.dtype)


def _check_prompt(x: ArrayLike, y: ArrayLike, x_query: ArrayLike) -> tuple[Array, Array, Array]:
    """The arrays of a prompt, whose shapes fit together."""
    check_floating(x=x, y=y, x_query=x_query)
    shape = jnp.shape(x)
    if len(shape) < 2 or shape[-2] < 1:
        raise ValueError(f"x must have shape [..., 1 or more examples, d], got {tuple(shape)}")
    check_shape(shape[:-1], y=y)
    check_shape((*shape[:-2], shape[-1]), x_query=x_query)
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(x_query)
