"""Which losses help where labels are wrong or classes are rare: classifiers of handwritten digits.

A network of one hidden layer learns scikit-learn's digits in three settings, with each loss from
five seeds, which draw parameters, batches and damage:

- wrong labels: 40% of the training labels are another class, any with the same probability;
- rare classes: of each of the digits 0 to 4 only eight images are trained on;
- rare positives: digit 8 against the others, 32 images of it.

The test images have neither. Every loss has the same network, optimizer and number of steps.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxref import losses, metrics
from jaxref.bench.harness import Measurement, progress
from jaxref.core.figures import new_axes
from jaxref.train.images import load_images

NAME = "losses_digits"
FEATURES = 64


class Setting(NamedTuple):
    """What the losses are compared on.

    Attributes:
      name: in two words.
      labels: int32 `[seeds, examples]` to train on.
      trained_on: bool `[seeds, examples]`: which examples there are.
      classes: 10, or 1 for the score of a binary decision.
      metrics: what logits `[tests, classes]`, or scores `[tests]`, of the test images are worth.
    """

    name: str
    labels: np.ndarray
    trained_on: np.ndarray
    classes: int
    metrics: Mapping[str, Callable[[Array], Array]]


def run(
    *, quick: bool = False, seeds: int = 5, steps: int = 800, only: str = "", plot: str = ""
) -> Iterator[Measurement]:
    """`steps` steps from each of `seeds` seeds; `only`: some of the losses, by commas; `plot`: a
    file to draw the result to."""
    if quick:
        seeds, steps, only = 2, 3, only or "adaptive_ldr_loss,ensemble_calibrated_loss"
    found = []
    for setting in settings(seeds):
        for label, loss in compared_losses(setting).items():
            if only and label not in only.split(","):
                continue
            progress(f"{setting.name}: {label}")
            for metric, values in study(loss, setting, steps=steps).items():
                error = np.std(values, ddof=1) / np.sqrt(len(values))
                found.append(Measurement(NAME, setting.name, label, metric, float(values.mean())))
                yield found[-1]
                found.append(
                    Measurement(NAME, setting.name, label, f"{metric} standard error", float(error))
                )
                yield found[-1]
    if plot:
        plot_study(found)[0].figure.savefig(plot, dpi=120)


def settings(seeds: int) -> Iterator[Setting]:
    """The three settings, with the damage that each seed does."""
    digits = load_images("digits")
    train, test = digits.train_labels, jnp.asarray(digits.validation_labels)
    rng = np.random.default_rng(0)
    labels = np.broadcast_to(train, (seeds, len(train)))
    everything = np.ones(labels.shape, bool)

    wrong = rng.random(labels.shape) < 0.4
    noisy = np.where(wrong, (labels + rng.integers(1, 10, size=labels.shape)) % 10, labels)

    def accuracy(logits: Array) -> Array:
        return jnp.mean(jnp.argmax(logits, -1) == test)

    yield Setting("wrong labels", noisy.astype(np.int32), everything, 10, {"accuracy": accuracy})

    def balanced_accuracy(logits: Array) -> Array:
        right, of_class = jnp.argmax(logits, -1) == test, test == jnp.arange(10)[:, None]
        return jnp.mean(jnp.sum(right & of_class, -1) / jnp.sum(of_class, -1))

    few = few_of(train, range(5), seeds, rng)
    yield Setting("rare classes", labels, few, 10, {"balanced accuracy": balanced_accuracy})

    yield Setting(
        "rare positives",
        (labels == 8).astype(np.int32),
        few_of(train, [8], seeds, rng, count=32),
        1,
        {
            "AUROC": lambda scores: metrics.roc_auc(scores, test == 8),
            "F1 score": lambda scores: metrics.f1_score(scores > 0, test == 8),
        },
    )


def few_of(
    labels: np.ndarray, rare: Iterable[int], seeds: int, rng: np.random.Generator, count: int = 8
) -> np.ndarray:
    """Masks `[seeds, examples]` that leave `count` examples, drawn anew, of each rare class."""
    kept = np.ones((seeds, len(labels)), bool)
    for mask in kept:
        for label in rare:
            mask[rng.permutation(np.flatnonzero(labels == label))[count:]] = False
    return kept


def compared_losses(setting: Setting) -> dict[str, Callable[..., Any]]:
    """The losses of a setting by label, cross-entropy first."""
    counts = np.array(
        [np.sum((setting.labels == k) & setting.trained_on) for k in range(max(setting.classes, 2))]
    )
    if setting.classes == 1:
        return {
            "binary_cross_entropy": losses.binary_cross_entropy,
            "weighted binary_cross_entropy": partial(
                losses.binary_cross_entropy, positive_weight=counts[0] / counts[1]
            ),
            "sigmoid_focal_loss": losses.sigmoid_focal_loss,
            "hinge": partial(losses.margin_loss, kind="hinge"),
            "ensemble_calibrated_loss": losses.ensemble_calibrated_loss,
            "f_beta_loss": of_probabilities(losses.f_beta_loss),
            "balanced_accuracy_loss": of_probabilities(losses.balanced_accuracy_loss),
            "self_adjusting_dice_loss": of_probabilities(
                partial(
                    losses.self_adjusting_dice_loss, alpha=0.01, reduce_axes=None
                )  # as its authors train
            ),
            "mann_whitney_loss": whole_set(losses.mann_whitney_loss),
            "two_way_partial_auc_loss": losses.two_way_partial_auc_loss,
        }
    both: dict[str, Callable[..., Any]] = {
        "softmax_cross_entropy": losses.softmax_cross_entropy,
        "focal_loss": losses.focal_loss,
        "dual_focal_loss": losses.dual_focal_loss,
        "poly_cross_entropy": losses.poly_cross_entropy,
        "squentropy": losses.squentropy,
        "rescaled_square_loss": losses.rescaled_square_loss,
        "crammer_singer_loss": losses.crammer_singer_loss,
        "adaptive_ldr_loss": losses.adaptive_ldr_loss,
    }
    if setting.name == "wrong labels":
        return both | {
            "smoothed softmax_cross_entropy": partial(
                losses.softmax_cross_entropy, label_smoothing=0.2
            ),
            "generalized_cross_entropy": losses.generalized_cross_entropy,
            "mean_absolute_error": losses.mean_absolute_error_classification,
            "truncated_poly_loss": partial(losses.truncated_poly_loss, num_terms=2),
            "z_error_classification_loss": lambda *a: losses.z_error_classification_loss(*a)[0],
        }
    weights = counts.sum() / (len(counts) * counts)
    return both | {
        "weighted softmax_cross_entropy": partial(
            losses.softmax_cross_entropy, class_weights=weights
        ),
        "self_adjusting_dice_loss": partial(
            losses.self_adjusting_dice_loss_with_logits,
            alpha=0.01,  # as its authors train
        ),
        "one_versus_rest_loss": losses.one_versus_rest_loss,
    }


def of_probabilities(loss: Callable[..., Array]) -> Callable[[Array, Array], Array]:
    """A loss of probabilities as one of scores."""
    return lambda scores, labels: loss(jax.nn.sigmoid(scores), labels)


def whole_set(loss: Callable[..., Array]) -> Callable[[Array, Array], Array]:
    """A loss of queries and documents as one of a single query."""
    return lambda scores, labels: loss(scores[None], labels[None] == 1)


def study(
    loss: Callable[..., Any], setting: Setting, *, steps: int, batch: int = 128
) -> dict[str, np.ndarray]:
    """What the setting's metrics are after training with a loss, `[seeds]` each.

    Args:
      loss: of a batch's logits and labels, and whichever of `key`, `indices` and `state` it asks
        for; one with a state returns the next one beside its value.
      setting: one of `settings`.
      steps: of Adam at 2e-3.
      batch: examples a step.
    """
    digits = load_images("digits")
    images, tests = (
        jnp.asarray(part.reshape(len(part), FEATURES))
        for part in (digits.train_images, digits.validation_images)
    )
    asked = inspect.signature(loss).parameters
    optimizer = optax.adam(2e-3)

    def logits(params: Any, x: Array) -> Array:
        out = jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["output"]
        return out[..., 0] if setting.classes == 1 else out

    def one_seed(key: Array, labels: Array, trained_on: Array) -> dict[str, Array]:
        hidden_key, output_key, key = jax.random.split(key, 3)
        init = jax.nn.initializers.he_normal()
        params = {
            "hidden": init(hidden_key, (FEATURES, 256)),
            "bias": jnp.zeros(256),
            "output": 0.01 * init(output_key, (256, setting.classes)),  # undecided at first
        }
        state = None
        if "state" in asked:
            state = getattr(losses, f"{_name(loss).removesuffix('_loss')}_init")(len(images))

        def step(carry: Any, key: Array) -> tuple[Any, None]:
            params, opt_state, state = carry
            batch_key, key = jax.random.split(key)
            indices = jax.random.choice(
                batch_key, len(images), (batch,), replace=False, p=trained_on / trained_on.sum()
            )
            given = {"key": key, "indices": indices, "state": state}
            given = {name: value for name, value in given.items() if name in asked}

            def mean_loss(params: Any) -> tuple[Array, Any]:
                value = loss(logits(params, images[indices]), labels[indices], **given)
                value, following = value if "state" in asked else (value, None)
                return jnp.mean(value), following

            gradient, following = jax.grad(mean_loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, following), None

        carry: Any = params, optimizer.init(params), state
        (params, *_), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
        return {name: metric(logits(params, tests)) for name, metric in setting.metrics.items()}

    keys = jax.random.split(jax.random.key(0), len(setting.labels))
    found = jax.jit(jax.vmap(one_seed))(keys, setting.labels, setting.trained_on * 1.0)
    return {name: np.asarray(values) for name, values in found.items()}


def plot_study(measurements: list[Measurement], *, axes: Any = None) -> Any:
    """Draws mean and standard error of every loss, a panel for each setting and metric.

    Args:
      measurements: of `run`.
      axes: as many matplotlib axes as panels. Default: of a new figure.

    Returns:
      The axes.
    """
    values = {(m.case, m.metric, m.implementation): m.value for m in measurements}
    panels = list(
        dict.fromkeys((case, metric) for case, metric, _ in values if "error" not in metric)
    )
    axes = new_axes(len(panels)) if axes is None else axes
    for ax, (case, metric) in zip(np.ravel(axes), panels):
        rows = {key[2]: value for key, value in values.items() if key[:2] == (case, metric)}
        names = sorted(rows, key=rows.__getitem__)
        errors = [values[case, f"{metric} standard error", name] for name in names]
        base = next(iter(rows))  # cross-entropy
        ax.axvline(rows[base], color="gray", linewidth=1, linestyle=":")
        colors = ["tab:gray" if name == base else "tab:blue" for name in names]
        places = np.arange(len(names))
        ax.errorbar([rows[name] for name in names], places, xerr=errors, fmt="none", ecolor="black")
        ax.scatter([rows[name] for name in names], places, c=colors, zorder=3)
        ax.set_yticks(places, names, fontsize=8)
        ax.set(title=case, xlabel=metric)
    return axes


def _name(function: Callable[..., Any]) -> str:
    return function.func.__name__ if isinstance(function, partial) else function.__name__
