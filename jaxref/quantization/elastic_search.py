"""The search for the bits of each layer of an elastic network (EQ-Net): predictor and evolution."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.quantization.elastic import LEAST_BITS, MOST_BITS
from jaxref.quantization.fixed_point import check_length

_HIDDEN_LAYERS = 3


def accuracy_predictor_features(
    weight_bits: ArrayLike,
    activation_bits: ArrayLike,
    *,
    per_channel: ArrayLike,
    symmetric_weights: ArrayLike,
    symmetric_activations: ArrayLike,
) -> Array:
    """The formats of all layers as the input of an accuracy predictor.

    Args:
      weight_bits, activation_bits: `[..., layers]` integers in 2 to 8.
      per_channel, symmetric_weights, symmetric_activations: booleans `[...]`, or one for all.

    Returns:
      `[..., 14 layers + 3]` float32: the weights' bits one-hot, those of the activations, and the
      three conditions.

    Raises:
      ValueError: bits out of range, or of different shapes.
      TypeError: bits that are not integers.

    Use it for the formats that were measured, which `accuracy_predictor_fit` learns from, and for
    the candidates of `predict_accuracy` alike.

    Cost: 14 layers + 3 numbers a format.

    Example:
      >>> features = accuracy_predictor_features(
      ...     [2], [8], per_channel=True, symmetric_weights=False, symmetric_activations=True
      ... )
      >>> print(features)
      [1. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 0. 1. 1. 0. 1.]

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    weight_bits, activation_bits = jnp.asarray(weight_bits), jnp.asarray(activation_bits)
    check_length(LEAST_BITS, MOST_BITS, weight_bits=weight_bits, activation_bits=activation_bits)
    if weight_bits.ndim == 0:
        raise ValueError("weight_bits must have an axis of layers, got shape ()")
    check_shape(weight_bits.shape, activation_bits=activation_bits)
    batch = weight_bits.shape[:-1]
    parts = [
        jax.nn.one_hot(bits - LEAST_BITS, MOST_BITS - LEAST_BITS + 1, dtype=jnp.float32).reshape(
            *batch, -1
        )
        for bits in (weight_bits, activation_bits)
    ]
    conditions = (per_channel, symmetric_weights, symmetric_activations)
    flags = [jnp.broadcast_to(jnp.asarray(flag, jnp.float32), batch) for flag in conditions]
    return jnp.concatenate([*parts, jnp.stack(flags, axis=-1)], axis=-1)


class AccuracyPredictor(NamedTuple):
    """A network that says how accurate a network is in given formats.

    Attributes:
      kernels: of the three hidden layers and the head, `[in, out]`.
      biases: of the hidden layers, `[out]`.
      base: scalar, the accuracy that the head's output is added to; it is not trained.
    """

    kernels: tuple[Array, ...]
    biases: tuple[Array, ...]
    base: Array


def accuracy_predictor_fit(
    features: ArrayLike,
    accuracies: ArrayLike,
    *,
    key: Array,
    optimizer: optax.GradientTransformation | None = None,
    hidden_size: int = 400,
    steps: int = 500,
) -> AccuracyPredictor:
    """Trains a predictor on formats whose accuracy has been measured (CQAP), by squared errors.

    Args:
      features: `[n, k]` of `accuracy_predictor_features`.
      accuracies: `[n]` floating point, what was measured, n at least 1.
      key: random key of the weights at first (He's normal ones; the head begins at 0).
      optimizer: Default: `optax.adam(1e-3)`.
      hidden_size: width of the three hidden layers. Default 400.
      steps: steps with the whole of the data, at least 0. Default 500.

    Returns:
      The `AccuracyPredictor`, float32; its base is the mean accuracy.

    Raises:
      ValueError: shapes that do not match, or numbers out of range.
      TypeError: not floating point.

    Use it where a search (`evolutionary_bit_search`) asks for more accuracies than can be measured:
    a sample of formats is run on the data, and the predictor stands in for the rest.

    Cost: n measured accuracies; then `steps` gradients, each of O(n (k h + h²)) for n formats and
    the width h.

    Example:
      >>> features = jnp.eye(2)
      >>> predictor = accuracy_predictor_fit(
      ...     features, jnp.array([0.25, 0.75]), key=jax.random.key(0), hidden_size=16, steps=200
      ... )
      >>> print(predict_accuracy(predictor, features).round(2))
      [0.25 0.75]

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    check_floating(features=features, accuracies=accuracies)
    check_interval(1, jnp.inf, hidden_size=hidden_size)
    check_interval(0, jnp.inf, steps=steps)
    features, accuracies = jnp.asarray(features), jnp.asarray(accuracies, jnp.float32)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must have shape [n, k] with n at least 1, got {features.shape}")
    check_shape(features.shape[:1], accuracies=accuracies)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    sizes = [features.shape[1], *[hidden_size] * _HIDDEN_LAYERS]
    kernels = [
        jax.random.normal(k, (rows, columns)) * math.sqrt(2 / max(rows, 1))
        for k, rows, columns in zip(jax.random.split(key, _HIDDEN_LAYERS), sizes, sizes[1:])
    ]
    biases = tuple(jnp.zeros(hidden_size) for _ in range(_HIDDEN_LAYERS))
    predictor = AccuracyPredictor(
        (*kernels, jnp.zeros((hidden_size, 1))), biases, jnp.mean(accuracies)
    )

    def loss(trained):
        current = AccuracyPredictor(trained[0], trained[1], predictor.base)
        return jnp.mean(jnp.square(predict_accuracy(current, features) - accuracies))

    def step(carry, _):
        trained, state = carry
        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return (optax.apply_updates(trained, updates), state), None

    trained = predictor[:2]
    carry = trained, optimizer.init(trained)
    (trained, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)
    return AccuracyPredictor(trained[0], trained[1], predictor.base)


def predict_accuracy(predictor: AccuracyPredictor, features: ArrayLike) -> Array:
    """The accuracy that a predictor expects: three hidden layers with ReLU, and a linear head.

    Args:
      predictor: of `accuracy_predictor_fit`.
      features: `[..., k]` of `accuracy_predictor_features`.

    Returns:
      `[...]` float32.

    Raises:
      ValueError: features of another width.

    Use it as the `accuracy` of `evolutionary_bit_search`, after `accuracy_predictor_features`.

    Cost: k h + 2 h² + h multiplications a format, with the width h; no run of the network.

    Example:
      >>> kernels = jnp.eye(2), jnp.eye(2), jnp.eye(2), jnp.ones((2, 1))
      >>> predictor = AccuracyPredictor(kernels, (jnp.zeros(2),) * 3, jnp.array(0.5))
      >>> print(predict_accuracy(predictor, jnp.array([0.125, 0.25])))
      0.875

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    x = jnp.asarray(features, jnp.float32)
    check_shape((*x.shape[:-1], predictor.kernels[0].shape[0]), features=x)
    for kernel, bias in zip(predictor.kernels, predictor.biases):
        x = jax.nn.relu(x @ kernel + bias)
    return (x @ predictor.kernels[-1])[..., 0] + predictor.base


class BitSearch(NamedTuple):
    """What `evolutionary_bit_search` found.

    Attributes:
      weight_bits, activation_bits: int32 `[layers]`.
      accuracy: scalar, what the predictor expects of them.
      history: `[generations]`, the best accuracy of each generation's parents.
    """

    weight_bits: Array
    activation_bits: Array
    accuracy: Array
    history: Array


def evolutionary_bit_search(
    accuracy: Callable[[Array, Array], Array],
    cost: Callable[[Array, Array], Array],
    budget: float,
    *,
    layers: int,
    key: Array,
    population: int = 100,
    generations: int = 500,
    parent_ratio: float = 0.25,
    mutation_ratio: float = 0.5,
    mutation_probability: float = 0.1,
) -> BitSearch:
    """Looks for the bits of all layers with the best accuracy that a budget admits.

    Of each generation the most accurate are parents, and stay. Children are mutations, in which
    every number of bits is drawn anew with a small probability, and crossings, in which each is
    that of one of two parents; those over the budget are dropped.

    Args:
      accuracy: of weight bits and activation bits `[n, layers]` int32: `[n]`, in jax.
      cost: likewise, the average bits or the operations, say.
      budget: the highest cost, which 2 bits everywhere must not exceed.
      layers: at least 1.
      key: random key.
      population: children of a generation, at least 1. Default 100.
      generations: at least 1. Default 500.
      parent_ratio: parents by `population`, in (0, 1]. Default 0.25.
      mutation_ratio: the share of the children that are mutations, in [0, 1]. Default 0.5.
      mutation_probability: in [0, 1]. Default 0.1.

    Returns:
      The best `BitSearch` within the budget.

    Raises:
      ValueError: numbers out of range, or a budget below the cost of 2 bits everywhere.

    `allocate_bits_integer_program` is exact where the losses of layers add up; this takes any
    predictor, `predict_accuracy` of `accuracy_predictor_features` above all.

    Cost: `population` evaluations of `accuracy` and `cost` a generation, all at once; generations
    one after the other.

    Example:
      >>> search = evolutionary_bit_search(
      ...     lambda w, a: -jnp.sum((w - 5) ** 2 + (a - 3) ** 2, axis=-1),
      ...     lambda w, a: jnp.mean(w + a, axis=-1),
      ...     9,
      ...     layers=2,
      ...     key=jax.random.key(0),
      ...     generations=50,
      ... )
      >>> print(search.weight_bits, search.activation_bits, search.accuracy)
      [5 5] [3 3] 0.0

    Reference: Xu et al., "EQ-Net: Elastic Quantization Neural Networks", 2023, arXiv:2308.07650.
    """
    check_length(1, jnp.inf, layers=layers, population=population, generations=generations)
    check_interval(0, 1, closed="right", parent_ratio=parent_ratio)
    check_interval(0, 1, mutation_ratio=mutation_ratio, mutation_probability=mutation_probability)
    lowest = jnp.full((1, 2, layers), LEAST_BITS, jnp.int32)
    if not isinstance(key, jax.core.Tracer):
        check_interval(float(cost(lowest[:, 0], lowest[:, 1])[0]), jnp.inf, budget=budget)
    parents = max(round(parent_ratio * population), 1)
    mutations = round(mutation_ratio * population)

    def fitness(bits):
        values = jnp.asarray(accuracy(bits[:, 0], bits[:, 1]), jnp.float32)
        return jnp.where(cost(bits[:, 0], bits[:, 1]) <= budget, values, -jnp.inf)

    def select(bits, values):
        values, kept = jax.lax.top_k(values, parents)
        return bits[kept], values

    def generation(carry, key):
        bits, values = carry
        which, where, drawn, which_two, side = jax.random.split(key, 5)
        # Parents that a thin start has put over the budget have no children of their own.
        chance = jnp.isfinite(values) / jnp.sum(jnp.isfinite(values))

        def pick(key, shape):
            return bits[jax.random.choice(key, parents, shape, p=chance)]

        mutants = pick(which, (mutations,))
        fresh = jax.random.randint(drawn, mutants.shape, LEAST_BITS, MOST_BITS + 1)
        moves = jax.random.bernoulli(where, mutation_probability, mutants.shape)
        first, second = pick(which_two, (2, population - mutations))
        crossed = jnp.where(jax.random.bernoulli(side, 0.5, first.shape), first, second)
        children = jnp.concatenate([jnp.where(moves, fresh, mutants), crossed])
        everyone = jnp.concatenate([bits, children])
        return select(everyone, jnp.concatenate([values, fitness(children)])), values[0]

    def search(key):
        first, second, following = jax.random.split(key, 3)
        # Ceilings of their own, so that a low budget finds some of the first ones below it.
        ceiling = jax.random.randint(first, (population, 1, 1), LEAST_BITS, MOST_BITS + 1)
        bits = jax.random.randint(second, (population, 2, layers), LEAST_BITS, ceiling + 1)
        bits = jnp.concatenate([lowest, bits])
        start = select(bits, fitness(bits))
        end, history = jax.lax.scan(generation, start, jax.random.split(following, generations))
        return BitSearch(end[0][0, 0], end[0][0, 1], end[1][0], history)

    return jax.jit(search)(key)
