from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from sklearn.svm import SVC

from jaxref.adaptation.unlearning import (
    UnlearningMetrics,
    flat_loss,
    flat_loss_of_log_probs,
    mean_answer_probability,
    unlearning_gap,
    unlearning_metrics,
    variational_f_divergence,
)

metrics_of = jax.jit(unlearning_metrics)

NAMES = ("total_variation", "jensen_shannon", "pearson", "kl")


def answers(seed=0, batch=8, vocab=7):
    """Logits, labels and masks of templates of 5 tokens and answers to forget of 4."""
    rng = np.random.default_rng(seed)
    pairs = []
    for length in (5, 4):
        logits = (2 * rng.normal(size=(batch, length, vocab))).astype("f")
        labels = rng.integers(vocab, size=(batch, length))
        pairs.append((logits, labels, rng.uniform(size=(batch, length)) < 0.7))
    return pairs


def literal_probability(logits, labels, mask):
    total, count = 0.0, 0
    for row, label, counts in zip(logits.astype(np.float64), labels, mask):
        if counts:
            e = np.exp(row - row.max())
            total += e[label] / e.sum()
            count += 1
    return total / count if count else 0.0


def literal_loss(p_e, p_f, name):
    """Activation and conjugate of the activation, one after the other, in float64."""
    g = {
        "total_variation": lambda v: np.tanh(v) / 2,
        "jensen_shannon": lambda v: np.log(2) - np.log(1 + np.exp(-v)),
    }.get(name, lambda v: v)
    conjugate = {
        "total_variation": lambda u: u,
        "jensen_shannon": lambda u: -np.log(2 - np.exp(u)),
        "pearson": lambda u: u**2 / 4 + u,
        "kl": lambda u: np.exp(u - 1),
    }[name]
    return -g(p_e) + conjugate(g(p_f))


class TestFlat:
    def test_matches_the_formula_and_so_does_the_gradient(self):
        (template, template_labels, template_mask), (forget, forget_labels, forget_mask) = answers()

        def loss(template, forget, name, pool="example"):
            return flat_loss(
                template,
                np.where(template_mask, template_labels, -100),
                forget,
                np.where(forget_mask, forget_labels, -100),
                divergence=name,
                pool=pool,
                template_where=template_mask,
                forget_where=forget_mask,
            )

        @partial(jax.jit, static_argnums=2)
        def all_of(template, forget, name):
            slopes = jax.grad(lambda *x: loss(*x, name).sum(), argnums=(0, 1))(template, forget)
            return loss(template, forget, name), loss(template, forget, name, "batch"), slopes

        def literal(template, forget, name):
            return [
                literal_loss(
                    literal_probability(template[i], template_labels[i], template_mask[i]),
                    literal_probability(forget[i], forget_labels[i], forget_mask[i]),
                    name,
                )
                for i in range(len(template))
            ]

        for name in NAMES:
            value, pooled, slopes = all_of(template, forget, name)
            np.testing.assert_allclose(value, literal(template, forget, name), rtol=1e-5, atol=1e-6)
            p_e, p_f = (
                literal_probability(*(x.reshape(-1, *x.shape[2:]) for x in rows))
                for rows in answers()
            )
            np.testing.assert_allclose(pooled, literal_loss(p_e, p_f, name), rtol=1e-5, atol=1e-6)
            for which, x in enumerate((template, forget)):
                for place in ((0, 0, 1), (1, 2, 3), (4, 3, 0)):
                    step = np.zeros(x.shape)
                    step[place] = 1e-5
                    ends = [
                        sum(literal(*((x + s, forget) if which == 0 else (template, x + s)), name))
                        for s in (step, -step)
                    ]
                    np.testing.assert_allclose(
                        slopes[which][place], (ends[0] - ends[1]) / 2e-5, rtol=1e-3, atol=1e-6
                    )

    def test_log_probabilities_are_enough(self):
        (template, labels, mask), (forget, forget_labels, forget_mask) = answers(1)
        masks = {"template_where": mask, "forget_where": forget_mask}
        log_probs = [
            np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), y[..., None], -1)[..., 0]
            for x, y in ((template, labels), (forget, forget_labels))
        ]
        log_probs[0] = np.where(mask, log_probs[0], np.nan)
        loss = jax.jit(partial(flat_loss_of_log_probs, divergence="kl", **masks))
        of_logits = jax.jit(partial(flat_loss, divergence="kl"))
        value = of_logits(template, labels, forget, forget_labels, **masks)
        np.testing.assert_allclose(loss(*log_probs), value, rtol=1e-5)
        slope = jax.jit(jax.grad(lambda x: loss(x, log_probs[1]).sum()))(log_probs[0])
        np.testing.assert_array_equal(slope != 0, mask)
        half = loss(*(jnp.bfloat16(x) for x in log_probs))
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype("f"), value, atol=0.02)
        exact = mean_answer_probability(jnp.array([[-jnp.inf, 0.0]]))
        np.testing.assert_array_equal(exact, [0.5])

    def test_a_batch_may_be_spread_over_devices(self):
        (template, labels, mask), (forget, forget_labels, forget_mask) = answers(2)
        arrays = (template, labels, forget, forget_labels, mask, forget_mask)

        def pooled(template, labels, forget, forget_labels, mask, forget_mask, axis_name=None):
            loss = lambda x: flat_loss(
                template,
                labels,
                x,
                forget_labels,
                pool="batch",
                template_where=mask,
                forget_where=forget_mask,
                axis_name=axis_name,
            )
            return jax.value_and_grad(loss)(forget)

        rows = PartitionSpec("data")
        spread = jax.jit(
            jax.shard_map(
                partial(pooled, axis_name="data"),
                mesh=Mesh(np.array(jax.devices()), "data"),
                in_specs=rows,
                out_specs=(PartitionSpec(), rows),
            )
        )
        for ours, plain in zip(spread(*arrays), jax.jit(pooled)(*arrays)):
            np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-8)

    def test_extreme_logits_and_empty_answers(self):
        (template, labels, mask), (forget, forget_labels, forget_mask) = answers(3)
        for name in NAMES:

            def loss(template, forget):
                return flat_loss(
                    template,
                    labels,
                    forget,
                    forget_labels,
                    divergence=name,
                    template_where=mask & (np.arange(8) > 1)[:, None],
                    forget_where=forget_mask & (np.arange(8) % 2 > 0)[:, None],
                )

            value, pull = jax.vjp(jax.jit(loss), 1e4 * template, -1e4 * forget)
            assert np.isfinite(value).all()
            assert all(np.isfinite(x).all() for x in pull(jnp.ones_like(value)))
            assert value[0] == 0

    def test_bad_input(self):
        (template, labels, _), (forget, forget_labels, _) = answers(4)
        good = (template, labels, forget, forget_labels)
        for change, options, error, message in (
            ({0: labels}, {}, TypeError, "template_logits must have a floating-point type"),
            ({1: labels[:, :3]}, {}, ValueError, "template_labels must have shape"),
            ({3: forget[..., 0]}, {}, TypeError, "forget_labels must be integers, got float32"),
            ({2: forget[:3], 3: forget_labels[:3]}, {}, ValueError, "forget_log_probs must have"),
            ({}, {"divergence": "hellinger"}, ValueError, "divergence must be one of"),
            ({}, {"pool": "token"}, ValueError, "pool must be 'example' or 'batch', got 'token'"),
            ({}, {"forget_where": labels > 0}, ValueError, "where must broadcast to shape"),
        ):
            arguments = [change.get(i, x) for i, x in enumerate(good)]
            with pytest.raises(error, match=message):
                flat_loss(*arguments, **options)
        assert np.isnan(flat_loss(template, np.full_like(labels, 7), *good[2:])).all()
        with pytest.raises(ValueError, match=r"log_probs must have shape \[..., length\]"):
            mean_answer_probability(0.0)


class TestClaims:
    def test_an_f_divergence_is_the_best_of_its_variational_form(self):
        rng = np.random.default_rng(5)
        p, q = rng.dirichlet(np.ones(6), size=(2, 20))
        middle = (p + q) / 2
        kl = lambda a, b: np.sum(a * np.log(a / b), axis=-1)
        divergences = {
            "total_variation": (np.abs(p - q).sum(-1) / 2, 50 * np.sign(p - q)),
            "jensen_shannon": (kl(p, middle) + kl(q, middle), np.log(p / q)),
            "pearson": (((p - q) ** 2 / q).sum(-1), 2 * (p / q - 1)),
            "kl": (kl(p, q), 1 + np.log(p / q)),
        }
        for name, (divergence, best) in divergences.items():
            g, conjugate = variational_f_divergence(name)
            bound = jax.jit(lambda v: jnp.sum(p * g(v) - q * conjugate(v), axis=-1))
            np.testing.assert_allclose(bound(best.astype("f")), divergence, rtol=1e-4, atol=1e-5)
            others = rng.normal(size=(100, 20, 6)).astype("f")
            assert np.all(bound(others) <= divergence + 1e-5)

    @pytest.mark.claim("flat-unlearning")
    def test_forgetting_slows_down_as_it_succeeds_where_gradient_ascent_goes_on(self):
        """One token of five is to be forgotten, another the template. The pull of FLAT on the
        logits goes to 0 with the probability of what is forgotten, and steps end with a probable
        template; the pull of gradient ascent grows to 1, and the logits run away."""
        template, forget = jnp.array([1]), jnp.array([0])

        def flat(logits):
            return flat_loss(logits[None], template, logits[None], forget)

        def ascent(logits):
            return jax.nn.log_softmax(logits)[0]

        def pull(loss, p):
            rest = jnp.log(jnp.full(4, (1 - p) / 4))
            return jnp.linalg.norm(jax.grad(loss)(jnp.concatenate([jnp.log(p)[None], rest])))

        def only_forget(logits):
            return flat_loss(jnp.zeros((1, 5)), template, logits[None], forget)

        @partial(jax.jit, static_argnums=0)
        def trained(loss):
            start = jnp.array([3.0, 0.0, 0.0, 0.0, 0.0])
            step = lambda _, x: x - 3 * jax.grad(loss)(x)
            return jax.lax.fori_loop(0, 200, step, start)

        pulls = jax.jit(lambda p: (pull(only_forget, p), pull(ascent, p)))
        for p in (1e-3, 1e-6):
            ours, theirs = pulls(p)
            assert ours < p
            assert theirs > 1
        logits = trained(flat)
        probs = jax.nn.softmax(logits)
        assert probs[1] > 0.9
        assert probs[0] < 0.05
        assert np.abs(logits).max() < 10
        assert -jax.nn.log_softmax(trained(ascent))[0] > 100

    def test_values_that_are_known(self):
        one, none = jnp.zeros((1, 1)), jnp.full((1, 1), -jnp.inf)
        assert np.allclose(flat_loss_of_log_probs(one, none), -np.tanh(1) / 2)
        assert np.allclose(flat_loss_of_log_probs(none, none, divergence="kl"), np.exp(-1))
        p = np.log(np.linspace(0.01, 1, 30, dtype="f"))[:, None]
        fixed = np.full_like(p, -1.0)
        both = jax.jit(
            lambda x, y: [flat_loss_of_log_probs(x, y, divergence=name) for name in NAMES]
        )
        assert np.all(np.diff(both(p, fixed)) < 0)
        assert np.all(np.diff(both(fixed, p)) > 0)


def examples_of(confidences):
    """Logits of two classes with these probabilities of the label, which is 0."""
    p = np.asarray(confidences)
    return np.log(np.stack([p, 1 - p], axis=-1)).astype("f"), np.zeros(len(p), int)


class TestMetrics:
    def test_counts(self):
        forget = examples_of([0.9, 0.4, 0.7, 0.2, 0.97])
        retain = examples_of([0.99, 0.97, 0.95, 0.3] * 3)
        test = examples_of([0.8, 0.6, 0.96])
        found = metrics_of(*forget, *retain, *test)
        np.testing.assert_allclose(found, [2 / 5, 3 / 4, 1.0, 4 / 5], rtol=1e-6)
        wrong = metrics_of(forget[0], np.full(5, 2), *retain, *test)
        assert np.isnan(wrong.unlearning_accuracy)

    def test_the_attack_agrees_with_a_support_vector_machine(self):
        rng = np.random.default_rng(6)
        retain, test = rng.beta(40, 1, size=300), rng.beta(3, 3, size=300)
        machine = SVC(C=3, gamma="auto").fit(
            np.concatenate([retain, test])[:, None], np.repeat([1, 0], 300)
        )
        for a in (0.3, 1.0, 40.0):
            forget = rng.beta(a, 1, size=400)
            sets = (examples_of(x) for x in (forget, retain, test))
            found = metrics_of(*(x for pair in sets for x in pair))
            expected = 1 - machine.predict(forget[:, None]).mean()
            assert abs(found.mia_efficacy - expected) < 0.1

    def test_gap_is_the_mean_difference(self):
        ours = UnlearningMetrics(0.1, 0.9, 0.8, 0.3)
        average, differences = unlearning_gap(ours, UnlearningMetrics(0.2, 1.0, 0.9, 0.1))
        np.testing.assert_allclose(differences, [0.1, 0.1, 0.1, 0.2], rtol=1e-6)
        np.testing.assert_allclose(average, 0.125, rtol=1e-6)

    def test_bad_input(self):
        some = examples_of([0.5, 0.6])
        with pytest.raises(ValueError, match=r"test_logits must have shape \[examples, classes\]"):
            unlearning_metrics(*some, *some, *examples_of([]))
        with pytest.raises(ValueError, match=r"retain_labels must have shape \(2,\), got \(1,\)"):
            unlearning_metrics(*some, some[0], some[1][:1], *some)
        with pytest.raises(TypeError, match="forget_labels must be integers"):
            unlearning_metrics(some[0], some[0][:, 0], *some, *some)
