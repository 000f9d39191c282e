"""Error feedback: distributed training that exchanges compressed gradients, EF21 and EF14.

The clients, whose functions f_i have the mean f, may be
- the devices along a mesh axis, inside `jax.shard_map`: `axis_name`. Each holds its own memory and
  sends the others its compressed message; no dense gradient travels;
- stacked on one device: `num_clients`. Gradients have a leading axis of clients;
- one: neither.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_interval, check_same_tree, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.optimizers.common import descend
from jaxref.optimizers.compressors import Compressor, identity_compressor, top_k_compressor


class ErrorFeedbackState(NamedTuple):
    """State of `ef21_gradient` and of `ef14_gradient`.

    Attributes:
      count: int32 scalar, the steps taken.
      client: what each client remembers, g_i of EF21 or the error e_i of EF14: a tree like the
        parameters in at least float32. With `axis_name` or `num_clients` its leaves have a leading
        axis of clients, which is the one to shard (`error_feedback_specs`).
      server: g of EF21 with `axis_name`, a tree like the parameters, the same everywhere. None
        where it is not needed: EF14 has none, and where all clients are at hand g is their mean.
      key: the key of a compressor that draws, None otherwise.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, shadowed as in optax
    client: optax.Updates
    server: optax.Updates | None
    key: Array | None


def ef21_client_update(
    client_state: Any, gradient: Any, compressor: Compressor, key: Array | None = None
) -> tuple[Any, Any]:
    """What one client of EF21 does in a step: compress how far its gradient is from what it sent.

        u_i = C(∇f_i - g_i);     g_i ← g_i + u_i

    Args:
      client_state: g_i, a tree of floating-point arrays, zeros at first.
      gradient: ∇f_i, a tree like it; for EF21-W ∇f_i / (n w_i).
      compressor: C, a `Compressor`; it compresses each leaf.
      key: of `jax.random`, for a compressor that needs one; another in each step and client. Leaf i
        of the flattened tree has `jax.random.fold_in(key, i)`.

    Returns:
      (message, client_state): the message is the tree with C's message for each leaf, all that has
      to be sent; the new g_i is what the receiver has, too, once it has added the message.

    Raises:
      ValueError: the trees do not match, or the compressor needs a key that is missing.

    Use it for clients that are processes of their own, as in federated learning; `ef21_gradient`
    does this for the devices of one program.

    Cost: one compression, and g_i, an array for each parameter that the client keeps.

    Example:
      >>> g = jnp.zeros(3)
      >>> for _ in range(2):
      ...     _, g = ef21_client_update(g, jnp.array([1.0, -4.0, 2.0]), top_k_compressor(1))
      ...     print(g)
      [ 0. -4.  0.]
      [ 0. -4.  2.]

    Reference: Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and
    Practically Faster Error Feedback", 2021, arXiv:2106.05203; Richtárik, Gasanov, Burlachenko,
    "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants", 2024,
    arXiv:2402.10774.
    """
    check_same_tree(client_state, gradient=gradient)
    _check_key(compressor, key)
    difference = jax.tree.map(jnp.subtract, gradient, client_state)
    message, sent = _compress(compressor, difference, key)
    return message, jax.tree.map(lambda g, u: g + u.astype(g.dtype), client_state, sent)


def ef21_gradient(
    compressor: Compressor,
    *,
    axis_name: Hashable | None = None,
    num_clients: int | None = None,
    weights: ArrayLike | None = None,
    initial: str = "compressed",
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21's estimate of the gradient, which clients keep up to date with compressed differences.

        each client:   u_i = C(∇f_i(x) / (n w_i) - g_i);     g_i ← g_i + u_i
        server:        g ← g + Σ_i w_i u_i = Σ_i w_i g_i

    with w_i = 1/n, or, in EF21-W, w_i = L_i / Σ_j L_j. Only the u_i travel. As the gradients settle
    the differences vanish, and with them the errors of the compression: g_i → ∇f_i, which is why it
    converges where compressing the gradients themselves does not. Stochastic gradients take the
    place of ∇f_i as they are.

    With `axis_name`, `update` has to run inside `jax.shard_map` on a worker's own gradient, of the
    local batch, without a leading axis. It gathers the messages along the axis and reads them all,
    so that every worker has the same g. The state's `client` leaves have a leading axis sharded
    over `axis_name`, [n, ...] globally, [1, ...] in a worker; the rest is replicated:

        specs = error_feedback_specs(state, "data")
        update = jax.shard_map(..., in_specs=(..., specs), out_specs=(..., specs))

    Differentiate with respect to `jax.lax.pcast(params, axis_name, to="varying")`: the gradient
    with respect to replicated parameters is summed over the workers, by a dense all-reduce.

    Args:
      compressor: C, a `Compressor`; it compresses each leaf.
      axis_name: the mesh axis, or tuple of axes, along which every worker is a client.
      num_clients: n, for gradients with a leading axis of clients on one device; the updates have
        no such axis. With `axis_name` it only tells `init` how many rows to make: the size of the
        axis where `init` runs outside of `shard_map`, None (one row) where it runs inside.
      weights: [n] positive numbers proportional to w_i, the smoothness constants L_i in EF21-W.
        None: equal ones. For a positively homogeneous C (top-k, random k, sign) they change
        nothing, except which steps the theory allows.
      initial: "compressed" (default): g_i = C(∇f_i) in the first step. "gradient": g_i = ∇f_i,
        sent in full.
      key: of `jax.random`, for a compressor that needs one; every client, leaf and step draws with
        a key of its own, derived from it.

    Returns:
      the transformation of the clients' gradients into g, with the gradients' types. Its `update`
      takes the extra argument `participates`: a boolean, whether this worker takes part in the
      step (with `num_clients`: [n] booleans); u_i = 0 where it is false. Its state is an
      `ErrorFeedbackState`.

    Raises:
      ValueError: a number out of its range, weights of another shape than [n], an unknown
        `initial`, a missing key; in `update`, gradients of another structure or shape than the
        state.

    Use it before any optimizer in an `optax.chain`, where the exchange of gradients is what takes
    the time; `ef21` is gradient descent with it.

    Cost: g_i and g, two arrays for each parameter in a worker; a step gathers and decompresses the
    n messages.

    A gradient that is not finite stays in g_i for ever: skip the step and keep the old state, or
    let only the clients with finite gradients participate.

    Example:
      >>> estimate = ef21_gradient(top_k_compressor(1), num_clients=2)
      >>> gradients = jnp.array([[1.0, -4.0], [3.0, 2.0]])
      >>> g, state = estimate.update(gradients, estimate.init(jnp.zeros(2)))
      >>> print(g, estimate.update(gradients, state)[0])
      [ 1.5 -2. ] [ 2. -1.]

    Reference: Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and
    Practically Faster Error Feedback", 2021, arXiv:2106.05203; Richtárik, Gasanov, Burlachenko,
    "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants", 2024,
    arXiv:2402.10774.
    """
    clients = _Clients(axis_name, num_clients)
    clients.check()
    _check_key(compressor, key)
    if initial not in ("compressed", "gradient"):
        raise ValueError(f"initial must be 'compressed' or 'gradient', got {initial!r}")
    if weights is not None:
        check_interval(0, jnp.inf, closed="neither", weights=weights)

    def init(params):
        return ErrorFeedbackState(
            count=jnp.zeros([], jnp.int32),
            client=clients.zeros(params),
            server=None if axis_name is None else _zeros(params),
            key=key if compressor.needs_key else None,
        )

    def update(updates, state, params=None, *, participates=True, **extra_args):
        del params, extra_args
        client, gradients = clients.rows(state.client, updates)
        n = clients.size()
        constants = jnp.ones(n) if weights is None else jnp.asarray(weights)
        check_shape((n,), weights=constants)
        rows = len(clients.own(constants))
        check_broadcastable((rows,), participates=participates)
        participates = jnp.broadcast_to(participates, (rows,))
        shares = constants / jnp.sum(constants)
        scales = clients.own(jnp.mean(constants) / constants)
        keys = clients.keys(state)

        def client_update(compressor, g, gradient, scale, participates, key):
            def target(g, gradient):  # without a difference, nothing is sent
                return jnp.where(participates, scale * gradient.astype(g.dtype), g)

            target = jax.tree.map(target, g, gradient)
            return ef21_client_update(g, target, compressor, key)

        def step(compressor):
            message, after = jax.vmap(partial(client_update, compressor))(
                client, gradients, scales, participates, clients.own(keys)
            )
            if axis_name is None:
                return after, _weighted_sum(shares, after)
            return after, clients.receive(compressor, message, shares, keys, state.server)

        if initial == "compressed":
            client, server = step(compressor)
        else:
            client, server = jax.lax.cond(
                state.count == 0, lambda: step(identity_compressor()), lambda: step(compressor)
            )
        state = ErrorFeedbackState(
            count=optax.safe_increment(state.count),
            client=clients.stored(client),
            server=None if axis_name is None else server,
            key=state.key,
        )
        return _as_types_of(updates, server), state

    return optax.GradientTransformationExtraArgs(init, update)


def ef21(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor = top_k_compressor(0.1),
    *,
    axis_name: Hashable | None = None,
    num_clients: int | None = None,
    weights: ArrayLike | None = None,
    initial: str = "compressed",
    key: Array | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""EF21, and EF21-W: gradient descent of which only compressed differences travel.

        x ← x - lr (g + wd x)
        each client:   u_i = C(∇f_i(x) / (n w_i) - g_i);     g_i ← g_i + u_i
        server:        g = Σ_i w_i g_i

    It finds stationary points of smooth functions at gradient descent's rate 1/T, for any
    contractive C and however the f_i differ, with the constant steps of `ef21_step_size`.

    Args:
      learning_rate: lr at least 0, or a schedule count → lr.
      compressor: C, a `Compressor`; it compresses each leaf. Default: the largest tenth.
      axis_name: the mesh axis along which every worker is a client, inside `jax.shard_map`; see
        `ef21_gradient` for how.
      num_clients: n, for gradients with a leading axis of clients on one device; see
        `ef21_gradient`.
      weights: [n] positive numbers proportional to w_i, the L_i in EF21-W. None: equal ones.
      initial: "compressed" (default): g_i = C(∇f_i) in the first step. "gradient": g_i = ∇f_i.
      key: of `jax.random`, for a compressor that needs one.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. It is applied after the
        exchange, and not compressed.
      mask: tree of booleans, or a function that makes one of the estimates: what to decay.

    Returns:
      the transformation of the clients' gradients into steps, with the gradients' types. Its
      `update` takes the extra argument `participates`, as `ef21_gradient`'s does.

    Raises:
      ValueError: a number out of its range, weights of another shape than [n], an unknown
        `initial`, a missing key; in `update`, trees that do not match the state, or params missing
        where `weight_decay` needs them.

    Use it where the exchange of gradients is what takes the time. For another optimizer than
    gradient descent, use `ef21_gradient` in a chain with it.

    Cost: that of `ef21_gradient`: two arrays for each parameter in a worker; n messages
    decompressed a step.

    Example:
      >>> optimizer = ef21(0.1, top_k_compressor(1), num_clients=2)
      >>> gradients = jnp.array([[1.0, -4.0], [3.0, 2.0]])
      >>> print(optimizer.update(gradients, optimizer.init(jnp.zeros(2)))[0])
      [-0.15  0.2 ]

    Reference: Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and
    Practically Faster Error Feedback", 2021, arXiv:2106.05203; Richtárik, Gasanov, Burlachenko,
    "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants", 2024,
    arXiv:2402.10774.
    """
    estimate = ef21_gradient(
        compressor,
        axis_name=axis_name,
        num_clients=num_clients,
        weights=weights,
        initial=initial,
        key=key,
    )
    return _descend_along(estimate, learning_rate, weight_decay, mask)


def ef14_gradient(
    compressor: Compressor,
    *,
    axis_name: Hashable | None = None,
    num_clients: int | None = None,
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The classical error feedback: clients add what compression left over to the next gradient.

        each client:   u_i = C(e_i + ∇f_i(x));     e_i ← e_i + ∇f_i(x) - u_i
        server:        g = mean_i u_i

    The errors are in units of gradients, as in Seide et al.; Stich et al. and others remember lr
    times that, which is the same at a constant rate for a positively homogeneous C.

    Args:
      compressor: C, a `Compressor`; it compresses each leaf.
      axis_name: the mesh axis along which every worker is a client, inside `jax.shard_map`; see
        `ef21_gradient` for how.
      num_clients: n, for gradients with a leading axis of clients on one device; see
        `ef21_gradient`.
      key: of `jax.random`, for a compressor that needs one.

    Returns:
      the transformation of the clients' gradients into g, with the gradients' types. Its state is
      an `ErrorFeedbackState`, without `server`.

    Raises:
      ValueError: `num_clients` out of its range, a missing key; in `update`, gradients of another
        structure or shape than the state.

    Use it as the baseline of `ef21_gradient`: all that is left out of g arrives later, whereas EF21
    corrects g itself.

    Cost: e_i, one array for each parameter in a worker; a step gathers and decompresses the n
    messages.

    At a constant rate it stops at a distance from the minimum that grows with how much the ∇f_i
    differ there. A gradient that is not finite stays in e_i for ever.

    Example:
      >>> estimate = ef14_gradient(top_k_compressor(1))
      >>> gradient, state = jnp.array([1.0, -4.0, 3.0]), estimate.init(jnp.zeros(3))
      >>> for _ in range(2):
      ...     g, state = estimate.update(gradient, state)
      ...     print(g)
      [ 0. -4.  0.]
      [0. 0. 6.]

    Reference: Seide, Fu, Droppo, Li, Yu, "1-Bit Stochastic Gradient Descent and its Application to
    Data-Parallel Distributed Training of Speech DNNs", 2014; Stich, Cordonnier, Jaggi, "Sparsified
    SGD with Memory", 2018, arXiv:1809.07599.
    """
    clients = _Clients(axis_name, num_clients)
    clients.check()
    _check_key(compressor, key)

    def init(params):
        return ErrorFeedbackState(
            count=jnp.zeros([], jnp.int32),
            client=clients.zeros(params),
            server=None,
            key=key if compressor.needs_key else None,
        )

    def client_update(error, gradient, key):
        total = jax.tree.map(lambda e, g: e + g.astype(e.dtype), error, gradient)
        message, sent = _compress(compressor, total, key)
        return message, sent, jax.tree.map(jnp.subtract, total, sent)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        errors, gradients = clients.rows(state.client, updates)
        keys, n = clients.keys(state), clients.size()
        shares = jnp.full(n, 1 / n)
        message, sent, errors = jax.vmap(client_update)(errors, gradients, clients.own(keys))
        if axis_name is None:
            mean = _weighted_sum(shares, sent)
        else:
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), errors)
            mean = clients.receive(compressor, message, shares, keys, nothing)
        state = ErrorFeedbackState(
            count=optax.safe_increment(state.count),
            client=clients.stored(errors),
            server=None,
            key=state.key,
        )
        return _as_types_of(updates, mean), state

    return optax.GradientTransformationExtraArgs(init, update)


def ef14(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor = top_k_compressor(0.1),
    *,
    axis_name: Hashable | None = None,
    num_clients: int | None = None,
    key: Array | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with the classical error feedback, the baseline of `ef21`.

        x ← x - lr (mean_i u_i + wd x)
        each client:   u_i = C(e_i + ∇f_i(x));     e_i ← e_i + ∇f_i(x) - u_i

    Args:
      learning_rate: lr at least 0, or a schedule count → lr, the one at the time of sending.
      compressor: C, a `Compressor`; it compresses each leaf. Default: the largest tenth.
      axis_name: the mesh axis along which every worker is a client, inside `jax.shard_map`; see
        `ef21_gradient` for how.
      num_clients: n, for gradients with a leading axis of clients on one device; see
        `ef21_gradient`.
      key: of `jax.random`, for a compressor that needs one.
      weight_decay: wd at least 0, or a schedule; multiplied by lr. It is not compressed.
      mask: tree of booleans, or a function that makes one of the estimates: what to decay.

    Returns:
      the transformation of the clients' gradients into steps, with the gradients' types.

    Raises:
      ValueError: a number out of its range, a missing key; in `update`, trees that do not match
        the state, or params missing where `weight_decay` needs them.

    Use `ef21` but for a comparison: this one's last distance from a minimum is of the order of lr.

    Cost: one array for each parameter in a worker; n messages decompressed a step.

    Example:
      >>> optimizer = ef14(0.1, top_k_compressor(1))
      >>> print(optimizer.update(jnp.array([1.0, -4.0]), optimizer.init(jnp.zeros(2)))[0])
      [-0.  0.4]

    Reference: Seide, Fu, Droppo, Li, Yu, "1-Bit Stochastic Gradient Descent and its Application to
    Data-Parallel Distributed Training of Speech DNNs", 2014; Stich, Cordonnier, Jaggi, "Sparsified
    SGD with Memory", 2018, arXiv:1809.07599.
    """
    estimate = ef14_gradient(compressor, axis_name=axis_name, num_clients=num_clients, key=key)
    return _descend_along(estimate, learning_rate, weight_decay, mask)


def error_feedback_specs(state: Any, axis_name: Hashable) -> Any:
    """How the state of an optimizer with error feedback lies on a mesh: in_specs of `shard_map`.

    Args:
      state: the state of an optimizer, or of a chain of them; arrays or their shapes.
      axis_name: the mesh axis along which every worker is a client.

    Returns:
      a tree like `state` of `PartitionSpec`: `PartitionSpec(axis_name)` for what belongs to the
      clients, in every `ErrorFeedbackState` that it has, and `PartitionSpec()` for the rest.

    Use it for `in_specs` and `out_specs` of the `jax.shard_map` in which `ef21` or `ef14` runs with
    `axis_name`, alone or within a chain.

    Cost: a walk over the tree; no arrays.

    Example:
      >>> optimizer = ef21_gradient(top_k_compressor(1), axis_name="data", num_clients=8)
      >>> specs = error_feedback_specs(optimizer.init(jnp.zeros(3)), "data")
      >>> specs.client == PartitionSpec("data"), specs.server == PartitionSpec()
      (True, True)

    Reference: Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to
    Arithmetic Mean of Smoothness Constants", 2024, arXiv:2402.10774.
    """

    def specs(node):
        replicated = jax.tree.map(lambda _: PartitionSpec(), node)
        if not isinstance(node, ErrorFeedbackState):
            return replicated
        client = jax.tree.map(lambda _: PartitionSpec(axis_name), node.client)
        return replicated._replace(client=client)

    return jax.tree.map(specs, state, is_leaf=lambda node: isinstance(node, ErrorFeedbackState))


def _check_key(compressor, key):
    if compressor.needs_key and key is None:
        raise ValueError("key must be given for this compressor, got None")


class _Clients(NamedTuple):
    """Where the clients are. Inside of `update` all have a leading axis: of those held here."""

    axis_name: Hashable | None
    num_clients: int | None

    def check(self):
        n = self.num_clients
        if n is not None and (not isinstance(n, int | np.integer) or n < 1):
            raise ValueError(f"num_clients must be an integer of at least 1, got {n!r}")

    @property
    def stacked(self):
        return self.axis_name is not None or self.num_clients is not None

    def size(self):
        """n, the clients everywhere."""
        if self.axis_name is None:
            return self.num_clients or 1
        return jax.lax.axis_size(self.axis_name)

    def zeros(self, params):
        """What the clients remember at first."""
        n, zeros = self.num_clients or 1, _zeros(params)
        if not self.stacked:
            return zeros
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), zeros)

    def rows(self, client, updates):
        """The state and the gradients of the clients held here, which have to match."""
        if self.axis_name is not None:
            for leaf in jax.tree.leaves(client):
                check_shape((1, *leaf.shape[1:]), **{"a worker's client state": leaf})
            check_same_tree(jax.tree.map(lambda x: x[0], client), updates=updates)
            return client, _with_axis(updates)
        check_same_tree(client, updates=updates)
        return (client, updates) if self.stacked else (_with_axis(client), _with_axis(updates))

    def stored(self, client):
        return client if self.stacked else jax.tree.map(lambda x: x[0], client)

    def own(self, of_all):
        """The rows of [n, ...] that belong to the clients held here."""
        if self.axis_name is None or of_all is None:
            return of_all
        return of_all[jax.lax.axis_index(self.axis_name)][None]

    def keys(self, state):
        """The keys of all clients in this step, which every one of them knows."""
        if state.key is None:
            return None
        key = jax.random.fold_in(state.key, state.count)
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(self.size()))

    def receive(self, compressor, message, shares, keys, total):
        """`total` and the sum of all clients' messages, each times its share."""
        messages = jax.lax.all_gather(message, self.axis_name, tiled=True, to="invarying")

        def add(total, client):
            message, share, key = client
            sent = _decompress(compressor, message, total, key)
            return jax.tree.map(lambda t, u: t + share.astype(t.dtype) * u, total, sent), None

        return jax.lax.scan(add, total, (messages, shares, keys))[0]


def _with_axis(tree):
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def _zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=compute_dtype(x)), tree)


def _as_types_of(updates, tree):
    return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), tree, updates)


def _weighted_sum(shares, tree):
    """Σ_i share_i x_i over the leading axis."""

    def leaf(x):
        return jnp.sum(jnp.expand_dims(shares.astype(x.dtype), range(1, x.ndim)) * x, axis=0)

    return jax.tree.map(leaf, tree)


def _leaf_keys(key, count):
    return [None if key is None else jax.random.fold_in(key, i) for i in range(count)]


def _compress(compressor, tree, key):
    """The messages of the leaves, and what they will be read as."""
    leaves = jax.tree.leaves(tree)
    structure: Any = jax.tree.structure(tree)
    pairs = [_compress_leaf(compressor, x, k) for x, k in zip(leaves, _leaf_keys(key, len(leaves)))]
    messages, sent = zip(*pairs) if pairs else ((), ())
    return structure.unflatten(messages), structure.unflatten(sent)


def _compress_leaf(compressor, x, key):
    """A leaf that is explicitly sharded is compressed as a whole, as the receiver will read it."""
    sharding = jax.typeof(x).sharding
    explicit = any(sharding.spec)
    whole = jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec())) if explicit else x
    message = compressor.compress(whole, key)
    sent = compressor.decompress(message, whole, key)
    return message, jax.reshard(sent, sharding) if explicit else sent


def _decompress(compressor, message, like, key):
    leaves = jax.tree.leaves(like)
    structure: Any = jax.tree.structure(like)
    messages, keys = structure.flatten_up_to(message), _leaf_keys(key, len(leaves))
    sent = [compressor.decompress(m, x, k) for m, x, k in zip(messages, leaves, keys)]
    return structure.unflatten(sent)


def _descend_along(estimate, learning_rate, weight_decay, mask):
    """`descend` with an estimate whose leaves have no axis of clients, unlike the gradients."""
    steps = optax.chain(estimate, descend(optax.identity(), learning_rate, weight_decay, mask))

    def update(updates, state, params=None, **extra_args):
        wide = jax.tree.map(lambda g: jnp.asarray(g, compute_dtype(g)), updates)
        wide, state = steps.update(wide, state, params, **extra_args)
        return _as_types_of(updates, wide), state

    return optax.GradientTransformationExtraArgs(steps.init, update)
