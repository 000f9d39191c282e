import functools
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import optimizers
from jaxref.optimizers import (
    decentralized_spsa_step,
    decode_projected_gradient,
    encode_projected_gradient,
    sample_key,
    shared_randomness_update,
    spsa_projected_gradient,
)

KEY = jax.random.key(7)
NONE = 128  # the byte "no contribution"


def random_tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (4,), "kernel": (3, 4)}
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def data(samples, seed=0, rows=16):
    """[samples, rows] examples of a noisy linear rule, for `logistic_loss`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, rows, 3))
    labels = x.sum(-1, keepdims=True) * [1, -1, 0, 2] + rng.normal(size=(samples, rows, 4)) > 0
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.float32)


def logistic_loss(params, batch):
    x, labels = batch
    return optax.sigmoid_binary_cross_entropy(x @ params["kernel"] + params["bias"], labels).mean()


def bits_of(tree):
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def perturbation(params, step, machine, sample):
    """z of every leaf, in float64, by the documented folds."""
    key = KEY
    for identifier in (step, machine, sample):
        key = jax.random.fold_in(key, identifier)
    leaves, structure = jax.tree.flatten(params)
    z = [jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, [np.asarray(x, np.float64) for x in z])


def authors_codec(g):
    """The 9-bit form: sign(g) exp(clip(round(16 ln|g|), -127, 127) / 16)."""
    with np.errstate(divide="ignore"):
        power = np.clip(np.round(np.log(np.abs(g)) * 16), -127, 127)
    return np.exp(power / 16) * np.sign(g)


def slopes(seed=0, size=2000):
    rng = np.random.default_rng(seed)
    return (np.exp(rng.uniform(-17, 17, size)) * rng.choice([-1, 1], size)).astype(np.float32)


update = jax.jit(
    functools.partial(shared_randomness_update, base_key=KEY),
    static_argnames=("normalization", "bits", "mask"),
)


class CodecTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_nine_bits_are_the_authors_codec(self):
        g = np.concatenate([slopes(), [0.0]]).astype(np.float32)
        encode = self.variant(functools.partial(encode_projected_gradient, bits=9))
        decode = self.variant(functools.partial(decode_projected_gradient, bits=9))
        codes = encode(g)
        assert codes.dtype == jnp.uint16
        assert codes.max() < 512
        expected = authors_codec(g.astype(np.float64))
        close = np.isclose(decode(codes), expected, rtol=1e-6, atol=0)
        assert np.mean(close) > 0.99  # the rest lies on a boundary, where float32 decides
        np.testing.assert_allclose(decode(codes), expected, rtol=np.expm1(1 / 16) * 1.001)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((8, None, 8.0), (9, None, 16.0), (8, 4.0, 4.0), (9, 40.0, 40.0))
    def test_error_sign_order_and_range(self, bits, log_scale, scale):
        setting = {"bits": bits, "log_scale": log_scale}
        g = np.sort(slopes())
        ours = self.variant(functools.partial(decode_projected_gradient, **setting))(
            self.variant(functools.partial(encode_projected_gradient, **setting))(g)
        )
        largest = (2 ** (bits - 2) - 1) / scale
        inside = np.abs(np.log(np.abs(g))) <= largest
        assert 0.1 < inside.mean() < 1
        bound = np.expm1(1 / (2 * scale)) * (1 + 1e-5)
        np.testing.assert_allclose(ours[inside], g[inside], rtol=bound)
        assert np.max(np.abs(ours[inside] / g[inside] - 1)) > 0.9 * bound
        np.testing.assert_array_equal(np.sign(ours), np.sign(g))
        assert np.all(np.diff(ours) >= 0)
        np.testing.assert_allclose(np.abs(ours).max(), np.exp(largest), rtol=1e-6)
        np.testing.assert_allclose(np.abs(ours).min(), np.exp(-largest), rtol=1e-6)

    @parameterized.parameters(8, 9)
    def test_every_code_returns(self, bits):
        codes = jnp.arange(2**bits)
        values = decode_projected_gradient(codes, bits=bits)
        again = encode_projected_gradient(values, bits=bits)
        none = 2 ** (bits - 1)
        np.testing.assert_array_equal(again, jnp.where(codes == none, 0, codes))
        assert len(np.unique(values)) == 2**bits - 1
        assert values[0] == values[none] == 0

    def test_zero_and_what_is_not_finite_have_codes_of_their_own(self):
        g = jnp.array([0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, -2e-38])
        codes = encode_projected_gradient(g)
        np.testing.assert_array_equal(codes, [0, 0, NONE, NONE, NONE, 127, 129])
        assert codes.dtype == jnp.uint8
        np.testing.assert_array_equal(decode_projected_gradient(jnp.array([600, -1]), bits=9), 0)
        half = encode_projected_gradient(jnp.array(-2.0, jnp.bfloat16))
        assert (half.shape, half) == ((), encode_projected_gradient(-2.0))


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_projected_gradient_is_the_slope_along_z(self):
        """Exactly, on a quadratic; and its two evaluations are those of the formula."""
        params, target = random_tree(0), random_tree(1)
        loss = lambda x: optax.tree.norm(optax.tree.sub(x, target), squared=True) / 2
        slope = self.variant(
            lambda params, key: spsa_projected_gradient(loss, params, key, epsilon=0.1)
        )
        for sample in range(3):
            z = perturbation(params, 5, 2, sample)
            expected = optax.tree.vdot(z, optax.tree.sub(params, target))
            ours = slope(params, sample_key(KEY, 5, 2, sample))
            np.testing.assert_allclose(ours, expected, rtol=1e-5)
        cubic = lambda x: jnp.sum(x["bias"] ** 3)
        ours = spsa_projected_gradient(cubic, params, sample_key(KEY, 5), epsilon=0.5)
        z, x = perturbation(params, 5, 0, 0)["bias"], np.float64(params["bias"])
        expected = (((x + 0.5 * z) ** 3).sum() - ((x - 0.5 * z) ** 3).sum()) / (2 * 0.5)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_estimates_average_to_the_gradient(self):
        weights = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
        x = jnp.zeros(50)
        loss = lambda x: jnp.sum(jnp.sin(x) * weights)

        def estimate(sample):
            key = sample_key(KEY, 0, 0, sample)
            z = jax.random.normal(jax.random.fold_in(key, 0), x.shape)
            return spsa_projected_gradient(loss, x, key) * z

        mean = jax.jit(jax.vmap(estimate))(jnp.arange(20000)).mean(0)
        np.testing.assert_allclose(jnp.linalg.norm(mean), jnp.linalg.norm(weights), rtol=0.02)
        cosine = mean @ weights / jnp.linalg.norm(mean) / jnp.linalg.norm(weights)
        assert cosine > 0.99

    @parameterized.parameters(("sqrt", 8), ("mean", 8), ("sqrt", 9))
    def test_twenty_steps_follow_the_formula(self, normalization, bits):
        """A literal float64 transcription that decodes the codes by itself."""
        params = random_tree()
        expected = jax.tree.map(np.float64, params)
        schedule = optax.linear_schedule(0.1, 0.02, 20)
        batches = data(3)
        train = jax.jit(
            lambda params, step: decentralized_spsa_step(
                logistic_loss,
                params,
                batches,
                base_key=KEY,
                step=step,
                learning_rate=schedule,
                normalization=normalization,
                bits=bits,
            )
        )
        for step in range(20):
            params, info = train(params, step)
            ((*codes,),) = np.asarray(info.codes).tolist()
            for sample, code in enumerate(codes):
                q = code % 2 ** (bits - 1) - 2 ** (bits - 2)
                g = np.exp(q / 2 ** (bits - 5)) * (-1 if code >= 2 ** (bits - 1) else 1)
                z = perturbation(params, step, 0, sample)
                scale = -schedule(step) * g / (np.sqrt(3) if normalization == "sqrt" else 3)
                expected = jax.tree.map(lambda x, z: x + float(scale) * z, expected, z)
        chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)

    def test_gradients_instead_of_codes(self):
        """The full-precision exchange: the codes' values give the codes' update."""
        codes = encode_projected_gradient(jnp.array([0.7, -2.0, 0.0, jnp.nan]))
        values = decode_projected_gradient(codes).at[3].set(jnp.inf)
        arguments = (jnp.arange(4),), {"step": 1, "learning_rate": 0.1}
        ours, expected = (
            update(random_tree(), x, *arguments[0], **arguments[1]) for x in (values, codes)
        )
        assert bits_of(ours) == bits_of(expected)

    def test_losses_are_means_of_the_two_evaluations(self):
        params, batches = random_tree(), data(2)
        _, info = decentralized_spsa_step(
            logistic_loss, params, batches, base_key=KEY, step=3, learning_rate=0.1, epsilon=0.2
        )
        for sample in range(2):
            z = perturbation(params, 3, 0, sample)
            pair = [
                logistic_loss(
                    jax.tree.map(lambda x, z: x + shift * z, params, z),
                    jax.tree.map(lambda x: x[sample], batches),
                )
                for shift in (0.2, -0.2)
            ]
            np.testing.assert_allclose(info.losses[sample], np.mean(pair), rtol=1e-5)
            code = encode_projected_gradient((pair[0] - pair[1]) / 0.4)
            assert abs(int(code) - int(info.codes[0, sample])) <= 1


def machines_mesh():
    return jax.make_mesh((4,), ("machine",), devices=jax.devices()[:4])


def sharded_step(mesh, check_vma=True, **setting):
    """One step of four machines with two samples each, of params, step and all samples."""

    def one(params, step, batches):
        return decentralized_spsa_step(
            logistic_loss,
            params,
            batches,
            base_key=KEY,
            step=step,
            axis_name="machine",
            **{"learning_rate": 0.1} | setting,
        )

    info = optimizers.SpsaInfo(P("machine"), P())
    specs = {"in_specs": (P(), P(), P("machine")), "out_specs": (P(), info)}
    return jax.jit(jax.shard_map(one, mesh=mesh, check_vma=check_vma, **specs))


def on_machines(mesh, batches):
    return jax.device_put(batches, NamedSharding(mesh, P("machine")))


class TestClaims:
    @pytest.mark.claim("just-one-byte-zeroth-order")
    @pytest.mark.optimized
    def test_machines_that_exchange_one_byte_per_sample_learn_and_stay_bit_identical(self):
        """Four machines with data of their own: after 100 steps each has the same bits, the bits
        of one process that knows but the bytes. All that the compiled step moves between them is
        those bytes, whatever the number of parameters; and the loss falls."""
        mesh, batches = machines_mesh(), data(8)
        own_batches = on_machines(mesh, batches)
        start = params = random_tree()
        train, log = sharded_step(mesh), []
        for step in range(100):
            params, info = train(params, step, own_batches)
            log.append(np.asarray(info.codes))
        for leaf in jax.tree.leaves(params):
            (copy,) = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
            assert len(leaf.addressable_shards) == 4
            assert copy == np.asarray(leaf).tobytes()
        replayed = start
        for step, codes in enumerate(log):
            assert (codes.dtype, codes.shape) == (np.uint8, (4, 2))
            machines, samples = np.divmod(np.arange(8), 2)
            replayed = update(
                replayed, codes.ravel(), machines, samples, step=step, learning_rate=0.1
            )
        assert bits_of(replayed) == bits_of(params)
        loss = lambda params: np.mean(jax.vmap(logistic_loss, (None, 0))(params, batches))
        assert loss(params) < 0.7 * loss(start)

        wide = start | {"unused": jnp.zeros(1000)}
        for tree in (start, wide):
            text = train.lower(tree, 0, own_batches).compile().as_text()
            moved = re.findall(r"= (\S+?)(?:\{\S*)? (all-\w+|reduce-scatter|collective\S*)\(", text)
            assert [kind for _, kind in moved] == ["all-gather"]
            assert re.fullmatch(r"u8\[(4,1,2|4,2|8)\]", moved[0][0]), moved

    def test_one_byte_learns_as_well_as_full_precision(self):
        batches, start = data(8, rows=32), random_tree()
        loss = lambda params: jax.vmap(logistic_loss, (None, 0))(params, batches).mean()

        @functools.partial(jax.jit, static_argnums=0)
        def train(encode):
            def step(params, t):
                def slope(sample):
                    batch = jax.tree.map(lambda x: x[sample], batches)
                    own_loss = lambda params: logistic_loss(params, batch)
                    key = sample_key(KEY, t, 0, sample)
                    return encode(spsa_projected_gradient(own_loss, params, key))

                messages = jax.lax.map(slope, jnp.arange(8))
                params = shared_randomness_update(
                    params, messages, 0, jnp.arange(8), base_key=KEY, step=t, learning_rate=0.1
                )
                return params, None

            return jax.lax.scan(step, start, jnp.arange(300))[0]

        full, byte = loss(train(lambda g: g)), loss(train(encode_projected_gradient))
        assert full < 0.5 * loss(start)
        assert abs(byte / full - 1) < 0.02


WORKER = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from jaxref.optimizers import *

machine, receive, send = map(int, sys.argv[1:])
key = jax.random.key(7)
target = machine * jnp.arange(6.0)  # data that the other never sees
params = {"a": jnp.ones(6), "b": jnp.ones((3, 2), jnp.bfloat16)}
loss = lambda p: jnp.sum((p["a"] - target) ** 2) / 9 + jnp.sum(p["b"] ** 2)
measure = jax.jit(lambda p, step: encode_projected_gradient(
    spsa_projected_gradient(loss, p, sample_key(key, step, machine), epsilon=0.05)))
update = jax.jit(lambda p, step, codes: shared_randomness_update(
    p, codes, jnp.array([1, 2]), base_key=key, step=step, learning_rate=0.02))
for step in range(20):
    own = np.asarray(measure(params, step)).tobytes()
    os.write(send, own)
    other = os.read(receive, 1)
    codes = own + other if machine == 1 else other + own
    params = update(params, step, np.frombuffer(codes, np.uint8))
os.close(send)
assert os.read(receive, 1) == b""  # there was nothing more than one byte a step
sys.stdout.write(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params)).hex())
"""


def test_two_processes_that_exchange_bytes_end_with_the_same_bits():
    (from_1, to_2), (from_2, to_1) = os.pipe(), os.pipe()
    ends = {1: (from_2, to_2), 2: (from_1, to_1)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(machine), *map(str, pair)],
            pass_fds=pair,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for machine, pair in ends.items()
    ]
    for end in (from_1, to_2, from_2, to_1):
        os.close(end)
    (first, errors), (second, other_errors) = (worker.communicate() for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], (errors, other_errors)
    assert len(first) == 2 * (6 * 4 + 6 * 2)
    assert first == second
    untouched = {"a": jnp.ones(6), "b": jnp.ones((3, 2), jnp.bfloat16)}
    assert first.decode() != bits_of(untouched).hex()


class TestWorkersJoinAndLeave:
    def run(self):
        """Ten steps of a changing set of machines; the parameters and messages of each step."""
        present = [[3, 1]] * 3 + [[3, 1, 8]] * 3 + [[8, 1]] * 4  # 8 joins, then 3 leaves
        rng = np.random.default_rng(0)
        history, params = [], random_tree()
        for step, machines in enumerate(present):
            codes = rng.integers(0, 256, len(machines)).astype(np.uint8)
            history.append((params, machines, codes))
            params = update(params, codes, np.array(machines), step=step, learning_rate=0.01)
        return history, params

    def test_a_newcomer_replays_the_bytes_or_copies_the_parameters(self):
        """The log as one array of all machines that ever were, with a mask, in one scan from the
        checkpoint of step 2: another program, and the same bits."""
        history, final = self.run()
        names = np.array([8, 3, 1])
        codes, here = np.full((10, 3), NONE, np.uint8), np.zeros((10, 3), bool)
        for step, (_, machines, received) in enumerate(history):
            for machine, code in zip(machines, received):
                codes[step, names == machine], here[step, names == machine] = code, True

        @jax.jit
        def replay(params, first, codes, here):
            def step(params, log):
                t, codes, here = log
                setting = {"base_key": KEY, "step": t, "learning_rate": 0.01, "where": here}
                return shared_randomness_update(params, codes, names, **setting), None

            log = (first + jnp.arange(len(codes)), codes, here)
            return jax.lax.scan(step, params, log)[0]

        checkpoint, copy = history[2][0], history[7][0]
        assert bits_of(replay(checkpoint, 2, codes[2:], here[2:])) == bits_of(final)
        assert bits_of(replay(copy, 7, codes[7:], here[7:])) == bits_of(final)
        unmasked = jnp.ones_like(here[2:])  # "no contribution" says the same as the mask
        assert bits_of(replay(checkpoint, 2, codes[2:], unmasked)) == bits_of(final)
        assert bits_of(replay(checkpoint, 3, codes[2:], unmasked)) != bits_of(final)

    def test_messages_count_where_they_contribute(self):
        """Those that are absent or say nothing neither move the parameters nor enter √n."""
        params = random_tree()
        arguments = {"step": 4, "learning_rate": 0.1}
        codes, machines = np.array([64, 200, 0], np.uint8), np.array([5, 2, 4])
        expected = update(params, codes, machines, **arguments)
        more = np.array([NONE, *codes, 77], np.uint8), np.array([9, *machines, 2])
        where = np.array([True] * 4 + [False])
        assert bits_of(update(params, *more, **arguments, where=where)) == bits_of(expected)
        without_zero = update(params, codes[:2], machines[:2], **arguments)
        moved, farther = (
            optax.tree.norm(optax.tree.sub(x, params)) for x in (expected, without_zero)
        )
        np.testing.assert_allclose(farther / moved, np.sqrt(3 / 2), rtol=1e-4)

    def test_order_of_arrival_does_not_matter(self):
        codes = np.arange(60, 72, dtype=np.uint8)
        machines, samples = np.divmod(np.arange(12), 3)
        shuffle = np.random.default_rng(0).permutation(12)
        ours, expected = (
            update(random_tree(), codes[i], machines[i], samples[i], step=0, learning_rate=0.1)
            for i in (shuffle, np.arange(12))
        )
        assert bits_of(ours) == bits_of(expected)


class TestTransformations:
    def test_bits_do_not_depend_on_the_program(self):
        """Steps one by one, unjitted, unrolled into one program among other work, and vmapped."""
        params, codes = random_tree(), np.array([[60, 190], [75, 3]], np.uint8)
        params["kernel"] = params["kernel"].astype(jnp.bfloat16)

        def steps(params, codes):
            for step in range(2):
                params = shared_randomness_update(
                    jax.tree.map(lambda x: x + 0, params),
                    codes[step],
                    jnp.arange(2),
                    base_key=KEY,
                    step=step,
                    learning_rate=0.1,
                )
            return params

        expected = steps(params, codes)
        among = jax.jit(lambda p, c: (steps(p, c), jax.tree.map(jnp.sin, steps(p, c))))
        assert bits_of(among(params, codes)[0]) == bits_of(expected)
        constant = jax.jit(lambda: steps(params, codes))
        assert bits_of(constant()) == bits_of(expected)
        vmapped = jax.jit(jax.vmap(steps))(
            jax.tree.map(lambda x: jnp.stack([x, -x]), params), jnp.stack([codes, codes])
        )
        assert bits_of(jax.tree.map(lambda x: x[0], vmapped)) == bits_of(expected)
        assert expected["kernel"].dtype == jnp.bfloat16

    def test_bits_do_not_depend_on_float64_being_enabled(self):
        params, codes = random_tree(), jnp.array([64, 90], jnp.uint8)
        setting = {"base_key": KEY, "step": 3, "learning_rate": 0.1}
        narrow = shared_randomness_update(params, codes, jnp.arange(2), **setting)
        with jax.enable_x64(True):
            wide = shared_randomness_update(params, codes, jnp.arange(2), **setting)
        assert bits_of(narrow) == bits_of(wide)

    def test_update_rounds_once(self):
        """bfloat16 parameters: many steps, each less than half of their spacing, add up."""
        params = {"w": jnp.ones(64, jnp.bfloat16)}
        codes = np.full(64, 40, np.uint8)  # slopes of e^-3
        setting = {"step": 0, "learning_rate": 0.05}
        ours = update(params, codes, np.arange(64), **setting)["w"]
        wide = update({"w": jnp.ones(64)}, codes, np.arange(64), **setting)["w"]
        np.testing.assert_array_equal(ours, wide.astype(jnp.bfloat16))
        assert 0.05 * np.exp(-3) / 8 * 3 < 2**-9  # three deviations of a single step
        assert np.mean(ours != 1) > 0.2

    @pytest.mark.optimized
    def test_sharded_parameters_keep_their_bits_and_their_sharding(self):
        mesh = jax.make_mesh((8,), ("rows",))
        rows = NamedSharding(mesh, P("rows"))
        params, codes = {"w": jnp.ones((16, 4))}, np.array([60, 190], np.uint8)
        sharded = jax.device_put(params, rows)
        setting = {"step": 0, "learning_rate": 0.1}
        ours = update(sharded, codes, np.arange(2), **setting)
        assert ours["w"].sharding.is_equivalent_to(rows, 2)
        assert bits_of(ours) == bits_of(update(params, codes, np.arange(2), **setting))
        text = update.lower(sharded, codes, np.arange(2), **setting).compile().as_text()
        assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)

    def test_nine_bits_and_shard_map_without_type_checks(self):
        mesh, batches = machines_mesh(), on_machines(machines_mesh(), data(8))
        ours, info = sharded_step(mesh, bits=9)(random_tree(), 3, batches)
        assert (info.codes.dtype, info.codes.shape) == (jnp.uint16, (4, 2))
        assert info.codes.max() >= 256
        unchecked, same = sharded_step(mesh, check_vma=False, bits=9)(random_tree(), 3, batches)
        assert bits_of(unchecked) == bits_of(ours)
        np.testing.assert_array_equal(same.losses, info.losses)
        byte, _ = sharded_step(mesh)(random_tree(), 3, batches)
        assert bits_of(byte) != bits_of(ours)
        chex.assert_trees_all_close(byte, ours, atol=0.02)

    @pytest.mark.optimized
    def test_memory_does_not_grow_with_the_messages(self):
        """The update holds a few leaves, not a perturbation per message or a second tree."""
        params = {str(i): jax.ShapeDtypeStruct((2**16,), jnp.float32) for i in range(12)}

        def temporary(count):
            codes = jax.ShapeDtypeStruct((count,), jnp.uint8)
            compiled = update.lower(params, codes, np.arange(count), step=0, learning_rate=0.1)
            return compiled.compile().memory_analysis().temp_size_in_bytes

        assert temporary(64) < temporary(2) + 2**14
        assert temporary(64) < 5 * 2**16 * 4


class TestEdges:
    def train(self, params, loss=None, **setting):
        loss = loss or (lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p)))
        setting = {"learning_rate": 0.1, "base_key": KEY, "step": 0} | setting
        return jax.jit(lambda params: decentralized_spsa_step(loss, params, **setting))(params)

    def test_only_what_the_mask_selects_is_perturbed_and_trained(self):
        """The others may be of any type; the trained ones draw the z that they draw without."""
        params = {"bias": jnp.ones(4), "kernel": jnp.arange(3)}
        loss = lambda p: jnp.sum((p["bias"] - p["kernel"][0]) ** 2)
        mask = {"bias": True, "kernel": False}
        ours, info = self.train(params, loss, mask=mask, num_samples=2)
        np.testing.assert_array_equal(ours["kernel"], params["kernel"])
        floating = params | {"kernel": params["kernel"].astype(jnp.float32)}
        setting = {"step": 0, "learning_rate": 0.1}
        alone = update(floating, info.codes[0], 0, jnp.arange(2), **setting)
        assert bits_of(ours["bias"]) == bits_of(alone["bias"])
        assert bits_of(alone["kernel"]) != bits_of(floating["kernel"])

        is_float = lambda params: jax.tree.map(
            lambda x: jnp.issubdtype(x.dtype, jnp.floating), params
        )
        slope = spsa_projected_gradient(loss, params, sample_key(KEY, 0), mask=is_float)
        z = perturbation(floating, 0, 0, 0)["bias"]
        np.testing.assert_allclose(slope, 2 * z.sum(), rtol=1e-3)

    def test_scalar_empty_and_no_leaves(self):
        params = {"scalar": jnp.array(0.5), "empty": jnp.zeros((0, 3)), "none": None}
        ours, info = self.train(params, num_samples=3)
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)
        assert ours["scalar"] != 0.5
        assert info.losses.shape == (3,)
        assert self.train({}, lambda p: jnp.array(1.0))[1].codes == 0

    def test_zero_and_not_finite_slopes_move_nothing(self):
        params = {"bias": jnp.ones(4), "minus": -jnp.zeros(2)}
        for value, code in ((3.0, 0), (jnp.nan, NONE)):
            ours, info = self.train(params, lambda p: jnp.array(value))
            assert bits_of(ours) == bits_of(params)
            assert info.codes == code
        cliff = lambda p: jnp.where(p["bias"][0] > 1, jnp.inf, 0.0)
        ours, info = self.train(params, cliff, num_samples=4)
        assert bits_of(ours) == bits_of(params)
        np.testing.assert_array_equal(info.codes, NONE)

    def test_no_messages(self):
        nothing = np.zeros(0, np.uint8), np.zeros(0, int)
        ours = update(random_tree(), *nothing, step=0, learning_rate=0.1)
        assert bits_of(ours) == bits_of(random_tree())

    def test_bfloat16_parameters_train(self):
        loss = lambda p: jnp.sum(p["w"] ** 2)
        start = params = {"w": jnp.full(4, 2.0, jnp.bfloat16)}
        train = jax.jit(lambda p, t: self.train(p, loss, epsilon=0.05, num_samples=4, step=t)[0])
        for step in range(30):
            params = train(params, step)
        assert params["w"].dtype == jnp.bfloat16
        assert loss(params) < 0.05 * loss(start)

    def test_legacy_keys_and_schedules(self):
        schedule = lambda step: 0.1 / (step + 1)
        legacy = jax.random.PRNGKey(7)
        ours = self.train(random_tree(), base_key=legacy, step=3, learning_rate=schedule)
        expected = self.train(random_tree(), step=3, learning_rate=0.025)
        assert bits_of(ours) == bits_of(expected)


def bad_step(**changes):
    arguments = {"base_key": KEY, "step": 0, "learning_rate": 0.1} | changes
    loss = arguments.pop("loss", logistic_loss)
    params = arguments.pop("params", random_tree())
    return lambda: decentralized_spsa_step(
        loss, params, arguments.pop("data", data(2)), **arguments
    )


def bad_update(**changes):
    codes = changes.pop("codes", jnp.zeros(2, jnp.uint8))
    machines = changes.pop("machines", jnp.arange(2))
    setting = {"base_key": KEY, "step": 0, "learning_rate": 0.1} | changes
    return lambda: shared_randomness_update(random_tree(), codes, machines, **setting)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (bad_step(epsilon=0.0), ValueError, "epsilon must be in"),
        (bad_step(epsilon=jnp.nan), ValueError, "epsilon must be in"),
        (bad_step(learning_rate=-0.1), ValueError, "learning_rate must be in"),
        (bad_step(learning_rate=lambda step: np.inf), ValueError, "learning_rate must be in"),
        (bad_step(step=-1), ValueError, "step must be in"),
        (bad_step(step=0.5), TypeError, "step must be integers, got float32"),
        (bad_step(num_samples=3), ValueError, "size num_samples = 3, got"),
        (bad_step(data=None, num_samples=0), ValueError, "num_samples must be an integer of"),
        (bad_step(data=(jnp.ones(2), jnp.ones(3))), ValueError, "batches must have one leading"),
        (bad_step(data=jnp.array(1.0)), ValueError, "batches must have one leading"),
        (bad_step(data={}), ValueError, "batches must have one leading"),
        (bad_step(bits=7), ValueError, "bits must be 8 or 9, got 7"),
        (bad_step(log_scale=0.5), ValueError, "log_scale must be in"),
        (bad_step(normalization="sum"), ValueError, "normalization must be 'sqrt' or 'mean'"),
        (bad_step(mask={"bias": True}), ValueError, "mask must be a tree of booleans"),
        (bad_step(loss=lambda p, b: p["bias"]), ValueError, r"loss_fn must have shape \(\)"),
        (
            bad_step(params={"bias": jnp.arange(4)}),
            TypeError,
            r"params\['bias'\] must have a floating-point type, got int32",
        ),
        (bad_update(machines=jnp.array([4, 4])), ValueError, "machine 4, sample 0 more than once"),
        (bad_update(machines=jnp.array([-1, 0])), ValueError, "machines must be in"),
        (bad_update(machines=jnp.ones(2)), TypeError, "machines must be integers"),
        (bad_update(machines=jnp.arange(3)), ValueError, "machines must broadcast to shape"),
        (bad_update(samples=jnp.array([0.0, 1.0])), TypeError, "samples must be integers"),
        (bad_update(where=jnp.ones(3, bool)), ValueError, "where must broadcast to shape"),
        (bad_update(codes=jnp.ones(2, bool)), TypeError, "codes must be integers, got bool"),
        (lambda: encode_projected_gradient(3), TypeError, "gradient must have a floating-point"),
        (lambda: decode_projected_gradient(1.0), TypeError, "codes must be integers"),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
