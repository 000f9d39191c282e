"""Each way to spread a run over devices: as on one, and with the exchanges that it should have."""

import jax
import numpy as np
import pytest

from jaxref.parallel.compiled import collectives
from jaxref.train.config import load_config
from jaxref.train.program import build

ROWS, LENGTH, LAYERS, FEATURES, HIDDEN = 8, 16, 2, 32, 64
EXPERTS, CAPACITY = 4, 10  # places: two experts for each of 16 tokens, and a fifth more
TABLE = 256 * FEATURES * 4  # bytes of the embeddings, and of the output matrix
STREAM = ROWS * LENGTH * FEATURES * 4  # bytes of the activations between layers, of all tokens
SCALARS = 1024  # losses, norms and their like are less than this

MODEL = (
    "batch_size=8",
    "length=16",
    "steps=20",
    "model.num_layers=2",
    "model.features=32",
    "model.num_heads=4",
    "model.mlp_features=64",
    "model.scan_layers=True",
    "model.remat=True",
)
MIXTURE = (
    "model.mlp.name=MixtureOfExperts",
    "model.mlp.group_size=16",
    f"model.mlp.num_experts={EXPERTS}",
    "optimizer.name=sgd",
    "schedule.name=constant_schedule",
    "schedule.value=0.3",
)
SLICES = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
EF21 = (
    "optimizer.name=ef21",
    "optimizer.base.name=adamw",
    "optimizer.base.b2=0.99",
    "optimizer.base.weight_decay=0.1",
)


def batch(i):
    """Bytes that can be learnt: each follows from the one before."""
    start = np.random.default_rng(i).integers(0, 7, (ROWS, 1))
    tokens = (100 + (start + np.arange(LENGTH + 1)) % 7).astype(np.int32)
    ids = np.arange(ROWS, dtype=np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "ids": ids}


def run(overrides, devices):
    """The program, its compiled step, the losses of twenty steps and the parameters after them."""
    program = build(load_config(overrides=[*MODEL, *overrides]), 256, devices=devices)
    step = program.step.lower(program.abstract_state, program.abstract_batch).compile()
    state, losses = program.init(jax.random.key(0)), []
    for i in range(20):
        state, metrics = step(state, program.put(batch(i)))
        losses.append(float(metrics.loss))
    where = np.ones((ROWS, LENGTH), bool)
    evaluation = program.evaluate(state.params, program.put(batch(20) | {"where": where}))
    params = jax.tree.map(np.asarray, state.params)
    return program, step, np.array([*losses, float(evaluation.loss)]), params


@pytest.fixture(scope="module")
def alone():
    """The same run on one device, by what else is set."""
    runs = {}

    def find(overrides):
        if overrides not in runs:
            _, _, losses, params = run(("mesh.data=1", *overrides), jax.devices()[:1])
            assert losses[19] < losses[0] - 3
            runs[overrides] = losses, params
        return runs[overrides]

    return find


def exchanged(program, step):
    """Bytes that a device has after the collectives of a step, by axes and kind."""
    sums = {}
    for one in collectives(step, program.mesh):
        key = ",".join(one.axes), one.kind
        size = max(one.operand_bytes, one.result_bytes)
        sums[key] = sums.get(key, 0) + size * one.times
    return {key: size for key, size in sums.items() if size >= SCALARS}


def kernel_bytes(params):
    """Bytes of all parameters, and of the layers' matrices."""
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    matrices = [leaf for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim > 2]
    return size(params), size(matrices)


# In what follows a layer's matrices are gathered twice, forward and backward, where they are spread
# over fsdp. Their gradients are all-reduced: the CPU's compiler, other than the TPU's, leaves it at
# that where each device keeps a part.


def of_data(whole, matrices):
    return {("data", "all-reduce"): whole}


def of_fsdp(whole, matrices):
    return {
        ("fsdp", "all-gather"): 2 * matrices + TABLE,
        ("fsdp", "all-reduce"): matrices,
        ("fsdp", "reduce-scatter"): TABLE,  # of the output matrix
        ("fsdp", "all-to-all"): 2 * STREAM / 8,  # of embeddings, and of their gradients
    }


def of_tensor(whole, matrices):
    stream = STREAM / 2
    return {
        ("fsdp", "all-gather"): (2 * matrices + TABLE) / 4,
        ("fsdp", "all-reduce"): matrices / 4,
        ("fsdp", "reduce-scatter"): TABLE / 4,
        ("fsdp", "all-to-all"): 2 * stream,
        # Forward 2 sublayers, of which one is computed again; backward 2, whose 5 matrices the
        # CPU's compiler does not add up before. Embeddings, and the gradient of the last states.
        # No logits.
        ("tensor", "all-reduce"): LAYERS * 8 * stream + 2 * stream,
    }


def of_sequence(whole, matrices):
    block = STREAM / 8  # of queries, keys, values or outputs
    hops = 4 * 2 * 3  # of keys and values: forward, again, backward with their gradients
    shared_out = 3 * 4  # queries, keys, values and outputs between the two layouts, likewise
    return {
        ("sequence", "collective-permute"): LAYERS * (hops + shared_out) * block,
        ("data,sequence", "all-reduce"): whole - TABLE,
        ("sequence", "all-reduce"): TABLE,  # the gradient of the embeddings, one axis at a time
        ("data", "all-reduce"): TABLE,
    }


def of_experts(whole, matrices):
    experts = 3 * LAYERS * EXPERTS * FEATURES * HIDDEN * 4
    others = matrices - experts
    places = EXPERTS * CAPACITY * FEATURES * 4  # of the one group that a device has
    return {
        ("fsdp,expert", "all-gather"): 2 * others + TABLE,
        ("fsdp,expert", "all-reduce"): others,
        ("fsdp,expert", "reduce-scatter"): TABLE,
        ("fsdp,expert", "all-to-all"): 2 * STREAM / 8,
        ("fsdp", "all-gather"): 2 * experts / EXPERTS,
        ("fsdp", "all-reduce"): experts / EXPERTS,
        ("expert", "all-to-all"): LAYERS * 6 * places,  # there and back: forward, again, backward
    }


STRATEGIES = {
    "data": (("mesh.data=8",), (), of_data),
    "fsdp": (("mesh.data=1", "mesh.fsdp=8"), (), of_fsdp),
    "tensor": (("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"), (), of_tensor),
    "sequence": (("mesh.data=2", "mesh.sequence=4"), (), of_sequence),
    "expert": (("mesh.data=1", "mesh.fsdp=2", "mesh.expert=4"), MIXTURE, of_experts),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_twenty_steps_are_those_of_one_device_and_the_exchanges_are_those_expected(name, alone):
    mesh, others, expected = STRATEGIES[name]
    program, step, losses, params = run((*mesh, *others), None)
    alone_losses, alone_params = alone(others)
    np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
    jax.tree.map(
        lambda ours, one: np.testing.assert_allclose(ours, one, atol=2e-5), params, alone_params
    )
    found, sizes = exchanged(program, step), expected(*kernel_bytes(params))
    assert found.keys() == sizes.keys()
    for key, size in sizes.items():
        assert abs(found[key] - size) < SCALARS, key


@pytest.mark.slow
def test_all_axes_at_once(alone):
    mesh = ("mesh.data=1", "mesh.fsdp=2", "mesh.sequence=2", "mesh.tensor=2")
    _, _, losses, params = run(mesh, None)
    alone_losses, alone_params = alone(())
    np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
    jax.tree.map(
        lambda ours, one: np.testing.assert_allclose(ours, one, atol=2e-5), params, alone_params
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("mesh.sequence=8", "length=12"),
            r"length 12 must be a multiple of the 8 parts.*sequence",
        ),
        (("mesh.sequence=8", "model.positions=alibi"), r"a bias of the logits, which does not go"),
        (
            ("mesh.sequence=8", "model.attention.name=linear_attention"),
            r"split the length, which attention linear_attention cannot have",
        ),
        (("mesh.tensor=8",), r"key.*'kv_heads' of size 4 cannot be split 8 ways.*such as 4 in all"),
        (("mesh.tensor=4", "mesh.fsdp=2", "model.num_kv_heads=2"), r"'kv_heads' of size 2"),
        (("mesh.fsdp=8", "batch_size=4"), r"batch_size 4 must be .*accumulate x mesh.fsdp = 1 x 8"),
        (("mesh.fsdp=4",), r"mesh fsdp=4 does not divide the 8 devices"),
        (("mesh.data=8", 'rules.embed=["model"]'), r"'embed' on mesh axes \['model'\]"),
        (
            ("mesh.data=8", 'rules.embedding=["fsdp"]'),
            r"unknown configuration key 'rules.embedding'",
        ),
    ],
)
def test_what_cannot_be_spread_is_named(overrides, message):
    def trace():
        setting = [*MODEL, "mesh.data=1", *overrides]
        program = build(load_config(overrides=setting), 256)
        jax.eval_shape(program.step, program.abstract_state, program.abstract_batch)

    with pytest.raises(ValueError, match=message):
        trace()


@pytest.mark.slow
class TestCompressedBetweenSlices:
    """EF21 along "data", with parameters sharded over the other axes."""

    def test_uncompressed_it_is_the_run_on_one_device(self, alone):
        setting = (*SLICES, *EF21, "optimizer.compressor.name=identity_compressor")
        program, step, losses, params = run(setting, None)
        alone_losses, alone_params = alone(())
        np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
        jax.tree.map(
            lambda ours, one: np.testing.assert_allclose(ours, one, atol=2e-5), params, alone_params
        )
        whole, matrices = kernel_bytes(params)
        spread = matrices + 2 * TABLE
        of_both = 2 * (spread / 4 + whole - spread)
        [sent] = [size for (axes, _), size in exchanged(program, step).items() if "data" in axes]
        assert of_both <= sent < of_both + SCALARS

    def test_compressed_next_to_nothing_goes_between_the_slices(self):
        compressor = "optimizer.compressor.name=top_k_compressor", "optimizer.compressor.k=0.01"
        program, step, losses, params = run((*SLICES, *EF21, *compressor), None)
        assert losses[19] < losses[0] - 3
        found = collectives(step, program.mesh)
        sent = sum(one.result_bytes * one.times for one in found if "data" in one.axes)
        whole, _ = kernel_bytes(params)
        assert sent < 0.02 * whole


def test_what_is_kept_is_not_computed_again():
    def products(policy):
        setting = [*MODEL, "mesh.data=2", "mesh.sequence=4", f"model.remat_policy={policy}"]
        program = build(load_config(overrides=setting), 256)
        step = jax.make_jaxpr(program.step)(program.abstract_state, program.abstract_batch)
        return str(step).count("dot_general["), str(step).count("ppermute[")

    nothing, attention, products_alone = map(
        products, ("nothing_saveable", "attention_saveable", "dots_with_no_batch_dims_saveable")
    )
    assert attention[0] < nothing[0]
    assert attention[1] < nothing[1]  # keys and values go round once less
    assert products_alone[0] < nothing[0]
    assert products_alone[1] == nothing[1]
