"""How long a compiled step takes at the published peaks, on its own chips and on more of them.

The model is as simple as it can be. A chip computes at its peak, moves bytes through its memory at
the memory's bandwidth, and sends what its collectives send along each set of mesh axes at the
bandwidth of the links, or of the network, that lie along them. If all of that overlaps, a step
takes as long as the slowest; if nothing does, as long as all together. Distances in the torus,
latencies and the compiler's schedule have no part in it.
"""

import inspect
import math
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxref.models.blocks import component_class
from jaxref.train.chips import Pod
from jaxref.train.config import resolve


def model_flops(config: ConfigDict, active: float, tokens: float) -> float:
    """Operations that training on so many tokens takes by the model's formula, forward and twice
    that backward:

        6 · parameters · tokens + 12 · layers · heads · head_dim · length / 2 · tokens

    where the second term is causal attention's; what is recomputed does not count.

    Args:
      config: the whole configuration, of a `Transformer`.
      active: parameters that a token is multiplied with, from `active_parameters`.
      tokens: how many are trained on.

    Returns:
      The operations, multiplications and additions apart.
    """
    model = config.model
    width = model.get("head_dim", model.features // model.num_heads) * model.num_heads
    return (6 * active + 6 * model.num_layers * width * config.length) * tokens


def active_parameters(config: ConfigDict, params: Any) -> float:
    """Parameters that a token is multiplied with: not the rows of a table that it does not read,
    and of experts as many as it visits.

    Args:
      config: the whole configuration, as `jaxref.train.config.load_config` returns it.
      params: the model's parameters, or their `jax.ShapeDtypeStruct`s.

    Returns:
      Their number; not whole where only a share of the experts is visited.
    """
    asked = inspect.signature(component_class(resolve(config, "model.mlp")).__init__).parameters
    share = 1.0
    if "top_k" in asked and "num_experts" in asked:
        visited, experts = (
            config.model.mlp.get(name, asked[name].default) for name in ("top_k", "num_experts")
        )
        share = visited / experts
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith("embed.") and not config.model.tie_embeddings:
            continue
        of_an_expert = ".mlp." in name and ".router." not in name and ".norm." not in name
        total += leaf.size * (share if of_an_expert else 1.0)
    return total


class Sent(NamedTuple):
    """What a chip sends in a step along some mesh axes.

    Attributes:
      axes: of the mesh, outermost first.
      group_size: devices along them.
      kinds: bytes by kind of collective.
      bandwidth: bytes a second.
    """

    axes: tuple[str, ...]
    group_size: int
    kinds: dict[str, float]
    bandwidth: float

    @property
    def seconds(self) -> float:
        """The time that it takes."""
        return sum(self.kinds.values()) / self.bandwidth


class Work(NamedTuple):
    """A step's work on one chip, and where the limits are.

    Attributes:
      chips: how many there are.
      flops: operations of the compiled matrix products.
      model_flops: what the model's formula asks of a chip.
      traffic: bytes to and from the memory.
      state_bytes: of parameters and the optimizer's state, on this chip.
      gradient_bytes: of the parameters' gradient on this chip, in the type that is computed in.
      sent: by mesh axes.
      tokens: in a step, over all chips.
      rows: sequences on a chip, in all micro-batches.
      accumulate: micro-batches.
    """

    chips: int
    flops: float
    model_flops: float
    traffic: float
    state_bytes: float
    gradient_bytes: float
    sent: list[Sent]
    tokens: float
    rows: float
    accumulate: int


class Estimate(NamedTuple):
    """Times of a step.

    Attributes:
      seconds: by what takes them: "compute", "memory" and, joined by +, mesh axes.
      bound: the longest of them: of a step that overlaps all.
      total: their sum: of a step that overlaps nothing.
      bound_by: which is the longest.
      utilisation: the model's operations over what the chips could do in that time, for `bound` and
        for `total`.
      tokens_per_second: likewise.
    """

    seconds: dict[str, float]
    bound: float
    total: float
    bound_by: str
    utilisation: tuple[float, float]
    tokens_per_second: tuple[float, float]


def estimate(work: Work, pod: Pod) -> Estimate:
    """The times of a step at the chip's peaks.

    Args:
      work: of a step.
      pod: whose chip has the peaks.

    Returns:
      The `Estimate`, in seconds and tokens a second of all chips together.
    """
    seconds = {
        "compute": work.flops / pod.chip.flops,
        "memory": work.traffic / pod.chip.hbm_bandwidth,
        **{"+".join(sent.axes): sent.seconds for sent in work.sent},
    }
    bound_by = max(seconds, key=lambda name: seconds[name])
    times = seconds[bound_by], sum(seconds.values())
    ideal = work.model_flops / pod.chip.flops
    return Estimate(
        seconds,
        *times,
        bound_by,
        (ideal / times[0], ideal / times[1]),
        (work.tokens / times[0], work.tokens / times[1]),
    )


def scaled(work: Work, pod: Pod, factor: int, *, weak: bool) -> Work | None:
    """The same step on `factor` times the chips: first by a larger fsdp, up to a pod, then by more
    slices along data, which sum their gradients over the data-centre network.

    Along fsdp a chip gathers whole parameters and scatters whole gradients, once for each
    micro-batch: it sends (n-1)/n of their size, whatever the number n of devices. Slices sum what
    a chip then has of the gradient, in each micro-batch too. Along all other axes a chip sends
    activations, and these, like the operations and the rest of the traffic, go with its own
    tokens. Weak scaling leaves these as they are; strong scaling divides them by `factor`, in
    fewer micro-batches where one would be less than a sequence. Parameters and the optimizer's
    state are read and written once, by whoever holds them.

    Args:
      work: as compiled.
      pod: what it was compiled for.
      factor: a power of two.
      weak: whether the batch grows with the chips, or stays as it is.

    Returns:
      The work of one chip; None where a chip would have no sequence left, or more slices cannot be
      because the network's bandwidth is not published.
    """
    within = 1
    while within < factor and 2 * within * work.chips // pod.slices <= pod.chip.pod_size:
        within *= 2
    slices = factor // within
    share = 1.0 if weak else 1 / factor
    accumulate = work.accumulate if weak else min(work.accumulate, int(work.rows * share))
    if accumulate < 1 or (slices > 1 and pod.chip.dcn_bandwidth is None):
        return None
    grows = {"fsdp": within, "data": slices}
    sent = []
    for one in work.sent:
        grown = math.prod(grows.get(axis, 1) for axis in one.axes)
        n = one.group_size * grown
        of_weights = set(one.axes) <= {"fsdp", "data"}
        times = (n - 1) / n / ((one.group_size - 1) / one.group_size)
        times *= accumulate / work.accumulate if of_weights else share
        times /= within if one.axes == ("data",) else 1
        kinds = {kind: value * times for kind, value in one.kinds.items()}
        sent.append(one._replace(kinds=kinds, group_size=n))
    gradient = work.gradient_bytes / within
    if slices > 1 and not any("data" in one.axes for one in sent):
        assert pod.chip.dcn_bandwidth is not None
        summed = {"all-reduce": 2 * (slices - 1) / slices * gradient * accumulate}
        sent.append(Sent(("data",), slices, summed, pod.chip.dcn_bandwidth))
    held = 2 * work.state_bytes
    return work._replace(
        chips=work.chips * factor,
        flops=work.flops * share,
        model_flops=work.model_flops * share,
        traffic=max(0.0, work.traffic - held) * share + held / within,
        state_bytes=work.state_bytes / within,
        gradient_bytes=gradient,
        sent=sent,
        tokens=work.tokens * (factor if weak else 1),
        rows=work.rows * share,
        accumulate=accumulate,
    )
