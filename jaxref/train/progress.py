"""What a loop shows while it runs, and how it ends before its time."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

from jaxref.train.distributed import agreed_termination


def progress_bar(start: int, steps: int, *, disable: bool) -> tqdm:
    """A bar of steps, of which some were taken before.

    Args:
      start: steps that were taken before.
      steps: of the whole run, those included.
      disable: whether nothing is shown, as in all processes but one.

    Returns:
      The bar; `update()` after each step.
    """
    return tqdm(
        total=steps,
        initial=start,
        disable=disable,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        bar_format="{percentage:3.0f}%|{bar}| step {n}/{total} [{elapsed}<{remaining}{postfix}]",
    )


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Within this context the first SIGTERM or Ctrl-C ends nothing; the function that it gives says
    after each step if one came. A second one acts as ever. Several processes agree on the step.

    Yields:
      `terminated(step)`, to be called after each step with its number: whether to save and to end
      now.
    """
    if jax.distributed.is_initialized():
        with agreed_termination() as after:
            yield after
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: received.is_set()  # only the main thread may handle signals
        return

    def receive(number: int, _: object) -> None:
        received.set()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda _: received.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
