"""Federated learning: clients train on what only they have, and a server averages."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers import adaptive_gradient_clip


def federated_round(
    params: Any,
    client_batches: Any,
    client_weights: ArrayLike,
    local_update: Callable[[Any, Any], Any],
    num_local_steps: int | None = None,
    *,
    local_parameters: Any = None,
) -> Any:
    r"""One round of federated averaging: every client trains from the same parameters.

        θ_k ← E steps of local_update from θ on the batches of client k,
        θ ← θ + Σ_k n_k (θ_k - θ) / Σ_k n_k

    Clients keep nothing from round to round but their `local_parameters`: with those of the norms
    there it is FedBN, without any FedAvg. FedWon is FedAvg on networks without normalization, with
    the steps of `fedwon_client_update`.

    Args:
      params: θ, a tree of arrays.
      client_batches: a tree of arrays `[clients, batches, ...]`: the batches of each client.
      client_weights: n_k at least 0 `[clients]`, as a rule the number of its examples, and not all
        0; a client of weight 0 has no part in the average.
      local_update: `local_update(params, batch) -> params`, one step on one batch.
      num_local_steps: E at least 1; step t takes batch t modulo their number. Default: that number,
        one epoch.
      local_parameters: a tree of booleans of the structure of `params`: True for those that stay
        with their clients, which have a leading axis `[clients]`. Default: none.

    Returns:
      the parameters after the round, averaged in at least float32, of the shapes and types of
      `params`. Local ones are those of each client.

    Raises:
      ValueError: batches that differ in their numbers of clients or batches, weights of another
        number, negative or all 0, `num_local_steps` below 1, or `local_parameters` of another
        structure than `params` or without an entry for each client.

    Use it under `jax.jit`, with the axis of the clients split over the devices of a mesh, to
    simulate a federation or to run one of silos.

    Cost: clients · E local steps, with a copy of the parameters for each client in memory; over
    devices one all-reduce of the parameters' size a round.

    Example:
      >>> move = lambda params, batch: params + 0.5 * (batch - params)
      >>> batches = jnp.array([[0.0], [4.0]])  # two clients with a batch each
      >>> print(federated_round(jnp.array(0.0), batches, jnp.array([1.0, 3.0]), move))
      1.5

    Reference: Zhuang, Lyu, "FedWon: Triumphing Multi-domain Federated Learning Without
    Normalization", 2023, arXiv:2306.05879, after McMahan, Moore, Ramage, Hampson, Agüera y Arcas,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2016,
    arXiv:1602.05629.
    """
    num_clients, num_batches = _clients_and_batches(client_batches)
    if num_local_steps is None:
        num_local_steps = num_batches
    check_interval(1, jnp.inf, num_local_steps=num_local_steps)
    check_shape((num_clients,), client_weights=client_weights)
    check_interval(0, jnp.inf, client_weights=client_weights)
    if not isinstance(client_weights, jax.core.Tracer) and not np.any(np.asarray(client_weights)):
        raise ValueError(f"client_weights must have a positive sum, got {client_weights}")
    if local_parameters is None:
        local_parameters = jax.tree.map(lambda _: False, params)
    _check_local(params, local_parameters, num_clients)

    def train(params, batches):
        def step(params, t):
            batch = jax.tree.map(lambda leaf: leaf[t % num_batches], batches)
            return local_update(params, batch), None

        return jax.lax.scan(step, params, jnp.arange(num_local_steps))[0]

    held = jax.tree.map(lambda local: 0 if local else None, local_parameters)
    trained = jax.vmap(train, in_axes=(held, 0))(params, client_batches)
    weights = jnp.asarray(client_weights, jnp.float32)
    total = jnp.sum(weights)
    shares = weights / jnp.where(total > 0, total, 1.0)

    def average(start: Array, ends: Array, local: bool) -> Array:
        if local:
            return ends
        wide = jnp.asarray(start, compute_dtype(start))
        share = shares.reshape(-1, *(1,) * wide.ndim)
        moves = jnp.where(share > 0, share * (ends - wide), 0.0)  # diverged ones may be left out
        return (wide + jnp.sum(moves, axis=0)).astype(ends.dtype)

    return jax.tree.map(average, params, trained, local_parameters)


def fedwon_client_update(
    loss_fn: Callable[[Any, Any], Array],
    learning_rate: ArrayLike,
    clipping: ArrayLike = 1.28,
    *,
    last_layer: str,
) -> Callable[[Any, Any], Any]:
    r"""The local step of FedWon: descent along adaptively clipped gradients.

        g_i ← g_i min(1, λ max(‖w_i‖, 10⁻³) / ‖g_i‖)
        θ ← θ - η g

    for every unit i, what feeds one output, of all layers but the last.

    Args:
      loss_fn: `loss_fn(params, batch)`, a scalar: of a network without normalization, whose
        convolutions are `jaxref.nn.ScaledWeightStandardizedConv`s, say.
      learning_rate: η at least 0.
      clipping: λ > 0. Default 1.28, for batches of 32 and more; the paper goes down to 0.01 for
        small ones.
      last_layer: a regular expression, of the paths ("head/kernel") of the parameters of the last
        linear layer, which is not clipped.

    Returns:
      `local_update(params, batch) -> params`, for `federated_round`.

    Raises:
      ValueError: a negative `learning_rate`, a `clipping` that is not positive, or, when called, no
        parameter that `last_layer` matches.

    Use it where clients have data of different kinds, or batches down to a single example, on which
    batch normalization fails.

    Cost: one gradient a step, and the norms of units of weights and gradients; no state.

    Example:
      >>> loss = lambda params, batch: jnp.sum(params["head"] * batch)
      >>> update = fedwon_client_update(loss, 0.1, last_layer="head")
      >>> print(update({"head": jnp.ones(2)}, jnp.array([1.0, 2.0])))
      {'head': Array([0.9, 0.8], dtype=float32)}

    Reference: Zhuang, Lyu, "FedWon: Triumphing Multi-domain Federated Learning Without
    Normalization", 2023, arXiv:2306.05879.
    """
    check_interval(0, jnp.inf, learning_rate=learning_rate)
    is_last = re.compile(last_layer).search

    def clipped(params):
        def clips(path, _):
            return not is_last(jax.tree_util.keystr(path, simple=True, separator="/"))

        mask = jax.tree_util.tree_map_with_path(clips, params)
        if all(jax.tree.leaves(mask)):
            raise ValueError(f"last_layer must match the path of a parameter, got {last_layer!r}")
        return mask

    clip = optax.masked(adaptive_gradient_clip(clipping), clipped)

    def local_update(params, batch):
        gradients = jax.grad(loss_fn)(params, batch)
        gradients, _ = clip.update(gradients, clip.init(params), params)
        return jax.tree.map(lambda p, g: (p - learning_rate * g).astype(p.dtype), params, gradients)

    return local_update


def _clients_and_batches(client_batches: Any) -> tuple[int, int]:
    """The two leading sizes that all leaves share."""
    leading = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(client_batches)}
    sizes = leading.pop() if len(leading) == 1 else ()
    if len(sizes) != 2 or 0 in sizes:
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(client_batches)]
        raise ValueError(
            f"client_batches must have leaves of shape [clients, batches, ...], got {shapes}"
        )
    return sizes[0], sizes[1]


def _check_local(params: Any, local_parameters: Any, num_clients: int) -> None:
    structure: Any = jax.tree.structure(params)
    if jax.tree.structure(local_parameters) != structure:
        raise ValueError(
            f"local_parameters must have the tree structure {structure}, "
            f"got {jax.tree.structure(local_parameters)}"
        )
    for leaf, local in zip(jax.tree.leaves(params), jax.tree.leaves(local_parameters)):
        if local and jnp.shape(leaf)[:1] != (num_clients,):
            raise ValueError(
                f"local_parameters must have a leading axis of {num_clients} clients, "
                f"got {jnp.shape(leaf)}"
            )
