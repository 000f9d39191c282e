from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref import losses
from jaxref.losses import two_way_partial_auc_init

LIBAUC = np.load(Path(__file__).parents[1] / "oracles" / "partial_auc.npz")
OPTIONS = {
    "default": {},
    "sharp": {"margin": 0.7, "surrogate": "logistic"},
}
LOSSES = {
    "two_way": losses.two_way_partial_auc_loss,
    "one_way": losses.one_way_partial_auc_loss,
}

TEMPERATURE = {"two_way": "temperature_positive", "one_way": "temperature"}


def options_of(name, case):
    temperature = 0.5 if case == "sharp" else 1.0
    if name == "one_way":
        return {"temperature": temperature, "decay": 0.8} | OPTIONS[case]
    return {
        "temperature_negative": temperature,
        "temperature_positive": 1.5,
        "decay": (0.8, 0.6),
    } | OPTIONS[case]


@cache
def compiled(name):
    """`step(scores, labels, indices, state, where) -> (value, state), gradient` of 12 entries."""
    loss = LOSSES[name]
    return jax.jit(
        jax.value_and_grad(
            lambda s, y, i, state, where: loss(s, y, i, state, where=where), has_aux=True
        )
    )


ALL = np.ones(12, bool)


def random_batch(size=12, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % 3 == 0
    return rng.uniform(size=size).astype(np.float32), labels, rng.permutation(size)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(name=["two_way", "one_way"], case=["default", "sharp"])
    def test_two_steps_match_libauc(self, name, case):
        step = self.variant(
            jax.value_and_grad(partial(LOSSES[name], **options_of(name, case)), has_aux=True)
        )
        state = two_way_partial_auc_init(16)
        for i in range(2):
            batch = [LIBAUC[key][i] for key in ("scores", "labels", "indices")]
            (value, state), gradient = step(*batch, state)
            np.testing.assert_allclose(value, LIBAUC[f"{case}_{name}"][i], rtol=1e-5)
            expected = LIBAUC[f"{case}_{name}_grad"][i]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(np.exp(state.log_u), LIBAUC[f"{case}_{name}_u"], rtol=1e-5)
        if name == "two_way":
            np.testing.assert_allclose(np.exp(state.log_w), LIBAUC[f"{case}_two_way_w"], rtol=1e-5)


def robust_risk(scores, labels, temperature_negative, temperature_positive):
    """F of the whole set, with squared hinge."""
    losses_ij = jnp.maximum(1 - (scores[:, None] - scores), 0) ** 2
    inner = jnp.mean(jnp.exp(losses_ij / temperature_negative), axis=1, where=~labels)
    powers = inner ** (temperature_negative / temperature_positive)
    return temperature_positive * jnp.log(jnp.mean(powers, where=labels))


class TestClaims:
    @pytest.mark.claim("dactyl-deep-x-risk")
    def test_the_gradient_is_that_of_the_robust_risk_and_one_of_batches_comes_near_it(self):
        """In one step on the whole set with decay 1; in many on batches, by the running means."""
        scores, labels, indices = random_batch(24)

        @jax.jit
        def step(scores, labels, indices, state, negative, positive, decay):
            slope = jax.grad(losses.two_way_partial_auc_loss, has_aux=True)
            temperatures = {"temperature_negative": negative, "temperature_positive": positive}
            return slope(scores, labels, indices, state, **temperatures, decay=(decay, decay))

        risk_slope = jax.jit(lambda *temperatures: jax.grad(robust_risk)(scores, *temperatures))
        start = two_way_partial_auc_init(24)
        for temperatures in ((0.3, 0.5), (1.0, 1.0), (2.0, 0.7)):
            gradient, _ = step(scores, labels, indices, start, *temperatures, 1.0)
            expected = risk_slope(labels, *temperatures)
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

        rng = np.random.default_rng(0)
        draw = lambda mask, count: rng.choice(np.flatnonzero(mask), count, replace=False)
        batches = np.stack([np.r_[draw(labels, 2), draw(~labels, 4)] for _ in range(2000)])

        def batched(state, rows):
            slope, state = step(scores[rows], jnp.arange(6) < 2, rows, state, *temperatures, 0.05)
            return state, jnp.zeros(24).at[rows].add(slope)

        scores = jnp.asarray(scores)
        found = jax.lax.scan(batched, start, batches)[1][500:].mean(axis=0)
        assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected)
        mean_slope = risk_slope(labels, 1e5, 1e5)  # what plain pair losses would give
        assert np.linalg.norm(mean_slope - expected) > 0.4 * np.linalg.norm(expected)

    def test_high_temperatures_give_the_mean_over_pairs(self):
        scores, labels, indices = random_batch()
        mean = lambda s: jnp.mean(jnp.maximum(1 - s[labels][:, None] + s[~labels], 0) ** 2)
        value, gradient = jax.value_and_grad(mean)(scores)
        step = jax.value_and_grad(
            lambda s: losses.two_way_partial_auc_loss(
                s,
                labels,
                indices,
                two_way_partial_auc_init(12),
                temperature_negative=1e5,
                temperature_positive=1e5,
                decay=(1.0, 1.0),
            )[0]
        )
        ours, slope = jax.jit(step)(scores)
        np.testing.assert_allclose(ours, value, rtol=1e-4)
        np.testing.assert_allclose(slope, gradient, rtol=1e-3, atol=1e-6)

    def test_low_temperature_looks_at_the_hardest_negative(self):
        scores, labels, indices = random_batch()
        slope = jax.grad(
            lambda s: losses.one_way_partial_auc_loss(
                s, labels, indices, two_way_partial_auc_init(12), temperature=1e-3
            )[0]
        )
        gradient = jax.jit(slope)(scores)
        hardest = np.argmax(np.where(labels, -1, scores))
        assert np.flatnonzero(np.abs(gradient * ~labels) > 1e-6).tolist() == [hardest]


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_shards_give_the_value_gradient_and_state_of_the_whole(self, name):
        batch = random_batch(16)
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        loss = partial(LOSSES[name], **options_of(name, "default"))
        start = two_way_partial_auc_init(20)
        axes = ("data", "fsdp")
        specs = (*[PartitionSpec(axes)] * 3, PartitionSpec())
        sharded = jax.shard_map(
            partial(loss, axis_name=axes), mesh=mesh, in_specs=specs, out_specs=PartitionSpec()
        )
        whole = jax.jit(jax.value_and_grad(loss, has_aux=True))(*batch, start)
        apart = jax.jit(jax.value_and_grad(sharded, has_aux=True))(*batch, start)
        chex.assert_trees_all_close(apart, whole, rtol=1e-5, atol=1e-7)
        # likewise where the compiler splits batch and state
        placed = [
            jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            for x in (*batch, start.log_u)
        ]
        state = start._replace(log_u=placed[3])
        apart = jax.jit(jax.value_and_grad(loss, has_aux=True))(*placed[:3], state)
        chex.assert_trees_all_close(apart, whole, rtol=1e-5, atol=1e-7)

    def test_vmap_with_a_named_axis(self, name):
        batch, start = random_batch(), two_way_partial_auc_init(12)
        each = jax.vmap(
            partial(LOSSES[name], axis_name="shard"), in_axes=(0, 0, 0, None), axis_name="shard"
        )
        found = jax.jit(each)(*(x.reshape(3, 4) for x in batch), start)
        whole, _ = compiled(name)(*batch, start, ALL)
        expected = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), whole)
        chex.assert_trees_all_close(found, expected, rtol=1e-5)

    def test_excluded_entries_count_for_nothing(self, name):
        scores, labels, indices = random_batch()
        where, start = np.arange(12) < 8, two_way_partial_auc_init(12)
        poisoned = np.where(where, scores, np.nan)
        lost = np.where(where, indices, 99)
        (value, state), gradient = compiled(name)(poisoned, labels, lost, start, where)
        alone = LOSSES[name](scores[:8], labels[:8], indices[:8], start)
        chex.assert_trees_all_close((value, state), alone, rtol=1e-5)
        assert np.all(gradient[8:] == 0)
        assert np.all(gradient[:8] != 0)

    def test_without_positives_or_negatives_the_loss_is_0_and_the_state_stays(self, name):
        scores, labels, indices = random_batch()
        start = two_way_partial_auc_init(12)
        (_, state), _ = compiled(name)(scores, labels, indices, start, ALL)
        for same, where in ((ALL, ALL), (~ALL, ALL), (labels, ~ALL), (labels, labels)):
            (value, after), gradient = compiled(name)(scores, same, indices, state, where)
            assert value == 0
            assert np.all(gradient == 0)
            chex.assert_trees_all_equal(after, state)
        assert LOSSES[name](scores[:0], labels[:0], indices[:0], state)[0] == 0

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_scores_without_bounds_stay_finite(self, name, size):
        scores = np.tile(np.array([size, -size, 0.0, size, 1.0, -size], np.float32), 2)
        labels, state = np.arange(12) % 2 == 0, two_way_partial_auc_init(12)
        for _ in range(2):
            (value, state), gradient = compiled(name)(scores, labels, np.arange(12), state, ALL)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
            assert not np.any(np.isnan(state.log_u))

    def test_state_has_no_gradient_and_half_precision_keeps_its_type(self, name):
        scores, labels, indices = random_batch()
        start = two_way_partial_auc_init(12)
        (_, state), _ = compiled(name)(scores, labels, indices, start, ALL)

        @jax.jit
        def slopes(log_u, scores):
            def total(log_u, scores):
                after = LOSSES[name](scores, labels, indices, state._replace(log_u=log_u))
                return sum(
                    jnp.sum(jnp.where(jnp.isfinite(x), x, 0)) for x in jax.tree.leaves(after)
                )

            return jax.grad(total, argnums=(0, 1))(log_u, scores)

        by_state, by_scores = slopes(state.log_u, scores)
        assert np.all(by_state == 0)
        (_, _), expected = compiled(name)(scores, labels, indices, state, ALL)
        np.testing.assert_allclose(by_scores, expected, rtol=1e-5)
        half = scores.astype(jnp.bfloat16)
        (value, after), _ = compiled(name)(half, labels, indices, state, ALL)
        assert value.dtype == jnp.bfloat16
        assert after.log_u.dtype == after.log_w.dtype == jnp.float32

    def test_an_index_that_is_none_gives_nan(self, name):
        scores, labels, indices = random_batch()
        for lost in (indices + 12 * labels, indices - 12 * labels):
            start = two_way_partial_auc_init(12)
            assert np.isnan(compiled(name)(scores, labels, lost, start, ALL)[0][0])

    def test_bad_input_is_named(self, name):
        scores, labels, indices = random_batch()
        state = two_way_partial_auc_init(12)
        loss = LOSSES[name]
        with pytest.raises(ValueError, match="labels must be 0 or 1"):
            loss(scores, labels * 2, indices, state)
        with pytest.raises(ValueError, match=r"labels must have shape \(12,\)"):
            loss(scores, labels[:3], indices, state)
        with pytest.raises(ValueError, match=r"indices must have shape \(12,\)"):
            loss(scores, labels, indices[:3], state)
        with pytest.raises(ValueError, match=r"scores must have shape \[batch\]"):
            loss(scores[None], labels[None], indices[None], state)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(scores, labels, indices, state, where=np.ones(5, bool))
        with pytest.raises(ValueError, match="surrogate must be one of"):
            loss(scores, labels, indices, state, surrogate="cubic")
        with pytest.raises(ValueError, match="decay must be in"):
            loss(scores, labels, indices, state, decay=0.0 if name == "one_way" else (0.9, 1.1))
        with pytest.raises(ValueError, match=f"{TEMPERATURE[name]} must be in"):
            loss(scores, labels, indices, state, **{TEMPERATURE[name]: 0.0})
        with pytest.raises(TypeError, match="indices must be integers"):
            loss(scores, labels, scores, state)
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            loss(labels, labels, indices, state)


def test_init_and_its_bad_input():
    state = losses.one_way_partial_auc_init(3)
    assert state.log_u.shape == (3,)
    assert state.log_u.dtype == state.log_w.dtype == jnp.float32
    with pytest.raises(ValueError, match="num_examples must be in"):
        two_way_partial_auc_init(0)


def test_training_goes_on_from_a_checkpoint_where_it_stopped(tmp_path):
    scores, labels, indices = random_batch()

    @jax.jit
    def step(w, state):
        loss = lambda w: losses.two_way_partial_auc_loss(w * scores, labels, indices, state)
        slope, state = jax.grad(loss, has_aux=True)(w)
        return w - 0.1 * slope, state

    middle = step(*step(jnp.ones(12), two_way_partial_auc_init(12)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", middle)
        checkpointer.wait_until_finished()
        fresh = jax.tree.map(ocp.utils.to_shape_dtype_struct, middle)
        restored = checkpointer.restore(tmp_path / "step", fresh)
    chex.assert_trees_all_equal(step(*restored), step(*middle))
