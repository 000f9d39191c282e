"""Going on from a trained model with another loss: what alignment and unlearning share.

The outcome is a run of its own in a directory of the first one's, with configuration, records and
checkpoints, so that it can be evaluated and sampled from like any run, and goes on where it was
when it is started again.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils.epath import Path
from ml_collections import ConfigDict

from jaxref.train.checkpoints import Checkpoints
from jaxref.train.config import FREE_KEYS, ConfigError
from jaxref.train.distributed import first_process
from jaxref.train.loop import Data, build_program, restore, training_batches
from jaxref.train.losses import TokenLoss
from jaxref.train.methods.frame import Batch
from jaxref.train.program import Program, TrainState
from jaxref.train.progress import progress_bar, termination
from jaxref.train.records import Records, check_config, open_workdir

Advance = Callable[[TrainState, int], tuple[TrainState, dict[str, float], bool]]
Last = Callable[[Program, TrainState], optax.GradientTransformation | None]


class Continuation:
    """A run that starts at the newest checkpoint of another.

    Args:
      config: of the run to start from. Its section `name` has the keys `steps` and
        `learning_rate`.
      workdir: of the run to start from.
      directory: of the new run, below `workdir`.
      name: the section.
      data: the run's data.
      losses: what is minimised: `losses(model, batch, key)`.
      last: `last(program, start)`, what the optimizer's updates go through at the end, given the
        program and state of the run to start from; None for nothing.

    Attributes:
      config, workdir, program: of the new run.
      start: the state that it starts from.
      state: where it is.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        directory: str,
        name: str,
        data: Data,
        losses: TokenLoss,
        *,
        last: Last | None = None,
    ):
        if config.accumulate != 1:
            raise ConfigError(f"accumulate must be 1 for --mode={name}, got {config.accumulate}")
        options = config[name]
        base = build_program(config, data)
        restored, _ = restore(config, data, base, workdir)
        params = restored.params if restored.average is None else restored.average
        self.start = restored._replace(params=params)
        self.config = config.copy_and_resolve_references()
        self.config.steps = options.steps
        self.config.average_decay = 0.0
        with self.config.unlocked():
            self.config.schedule = {
                "name": "constant_schedule",
                "value": float(options.learning_rate),
            }
        self._outcome = self.program = build_program(self.config, data, losses=losses)
        if last is not None:
            self.program = build_program(
                self.config, data, losses=losses, last=last(base, self.start)
            )
        self._batches = training_batches(self.config, data, self.program.rows)
        self._name = name
        self.workdir = open_workdir(workdir / directory)
        free = [key for key in FREE_KEYS if key != name]
        first_process(lambda: check_config(self.workdir, self.config.to_dict(), free=free))
        self.state = self._first_state()

    def _first_state(self) -> TrainState:
        state = self.program.init(jax.random.key(self.config[self._name].seed))
        copied = partial(jax.tree.map, jnp.copy)  # a step overwrites what it is given
        return state._replace(
            params=copied(self.start.params), model_state=copied(self.start.model_state)
        )

    def run(self, advance: Advance, *, shown: Sequence[str], every: int = 10) -> bool:
        """Takes the steps that are left, and saves.

        Args:
          advance: `advance(state, step) -> (state, what to record, whether it is enough)`.
          shown: which of that the progress bar shows.
          every: steps between checkpoints.

        Returns:
          Whether it was finished; it was not when it was told to end before.
        """
        steps, kept = self.config.steps, self.config.to_dict()
        finished = False

        def abstract(saved: dict[str, Any]) -> TrainState:
            nonlocal finished
            finished = saved["finished"]
            return (self._outcome if finished else self.program).abstract_state

        with Checkpoints(self.workdir / "checkpoints") as checkpoints:
            restored = checkpoints.restore(abstract, self._batches)
            start = 0
            if restored is not None:
                self.state, start = restored
            if finished:
                return True
            with contextlib.ExitStack() as stack:
                records = (
                    stack.enter_context(Records(self.workdir, resume_step=start))
                    if jax.process_index() == 0
                    else None
                )
                terminated = stack.enter_context(termination())
                bar = stack.enter_context(progress_bar(start, steps, disable=records is None))
                for step in range(start + 1, steps + 1):
                    self.state, values, enough = advance(self.state, step)
                    stop = terminated(step)
                    done = enough or step == steps
                    bar.set_postfix_str(
                        ", ".join(f"{name} {values[name]:.3g}" for name in shown), refresh=False
                    )
                    bar.update()
                    if records is not None:
                        records.write(step, values)
                    if step % every == 0 or done or stop:
                        if records is not None:
                            records.flush()
                        checkpoints.save(
                            step,
                            self._as_of_any_run() if done else self.state,
                            self._batches,
                            config=kept | {"finished": done},
                            blocking=stop,
                        )
                    if done or stop:
                        return done
        raise AssertionError("the last step is done")

    def _as_of_any_run(self) -> TrainState:
        """The state, with that of an optimizer that ends in nothing."""
        if self._outcome is self.program:
            return self.state
        return self.state._replace(opt_state=self._outcome.init(self.state.key).opt_state)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """Arrays of rows that every process has, sharded over the mesh."""
        like = self.program.abstract_batch

        def spread(x: np.ndarray) -> Any:
            sharding = like["inputs" if x.ndim == 2 else "ids"].sharding
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(spread, batch)
