"""Time series to forecast, named by a string, and batches of windows that are read from them."""

from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import ConfigDict

from jaxref.core.checks import check_interval
from jaxref.train.data import Batch, example_batches


class SeriesSet(NamedTuple):
    """Series to forecast, standardised by the part to train on, channel by channel.

    Attributes:
      values: `[time, channels]` float32, all of them.
      split: the steps before it are to train on; forecasts of those after it are held out, which
        may look back beyond it.
      context_length: steps that a model reads.
      horizon: steps that it forecasts.
      period: steps of the season that the baseline "last season" repeats.
      description: where the series come from, in a few words.

    The methods are those of `jaxref.train.data.Corpus`.
    """

    values: np.ndarray
    split: int
    context_length: int
    horizon: int
    period: int
    description: str

    @property
    def measure(self) -> str:
        """What a validation loss is."""
        return "squared error"

    @property
    def num_windows(self) -> int:
        """How many windows lie in the part to train on."""
        return self.split - self.context_length - self.horizon + 1

    def sizes(self, config: ConfigDict) -> dict[str, Any]:
        """What the program has to know of the data."""
        del config
        return {
            "context_length": self.context_length,
            "horizon": self.horizon,
            "channels": self.values.shape[1],
            "num_examples": self.num_windows,
        }

    def summary(self) -> str:
        """The data in a line."""
        return (
            f"{self.description}; {self.values.shape[1]} series of {self.split:,} steps to train "
            f"on, {len(self.values) - self.split:,} held out; {self.horizon} steps from "
            f"{self.context_length}"
        )

    def per_step(self, config: ConfigDict) -> tuple[int, str]:
        """How many windows a step reads, and a name for their rate."""
        return config.batch_size, "windows_per_second"

    def batches(
        self, config: ConfigDict, rows: np.ndarray | None = None
    ) -> grain.IterDataset[Batch]:
        """The endless training batches, or of each only these rows."""
        return example_batches(
            self.num_windows,
            self.windows,
            batch_size=config.batch_size,
            seed=config.seed,
            rows=rows,
        )

    def windows(self, starts: np.ndarray) -> Batch:
        """The windows that start at these steps: inputs `[batch, context_length, channels]` and
        targets `[batch, horizon, channels]`."""
        steps = starts[:, None] + np.arange(self.context_length + self.horizon)
        inputs, targets = np.split(self.values[steps], [self.context_length], axis=1)
        return {"inputs": inputs, "targets": targets}

    def held_out(self, config: ConfigDict) -> tuple[list[Batch], dict[str, float]]:
        """The validation batches, and the mean squared errors of the forecasts that repeat the last
        value and the last season."""
        rows, starts = config.batch_size, self.held_out_starts()
        batches = []
        for first in range(0, len(starts), rows):
            ids = np.minimum(np.arange(first, first + rows), len(starts) - 1)
            where = np.arange(first, first + rows) < len(starts)
            batches.append(self.windows(starts[ids]) | {"where": where})
        inputs, targets = self.windows(starts).values()
        period = min(self.period, self.context_length)
        season = inputs[:, self.context_length - period + np.arange(self.horizon) % period]
        return batches, {
            "last value": float(np.mean(np.square(targets - inputs[:, -1:]), dtype=np.float64)),
            "last season": float(np.mean(np.square(targets - season), dtype=np.float64)),
        }

    def held_out_starts(self) -> np.ndarray:
        """Where the windows start whose targets are all held out."""
        first = self.split - self.context_length
        return np.arange(first, len(self.values) - self.context_length - self.horizon + 1)


def load_series(
    name: str,
    *,
    context_length: int = 48,
    horizon: int = 12,
    period: int = 24,
    validation_fraction: float = 0.2,
    **others: Any,
) -> SeriesSet:
    r"""The series that a name stands for, their end held out.

    Nothing is downloaded, and nothing is written. `name` is one of

    - `seasons`: three made series of 4000 steps, c = 0, 1, 2, the same every time,

          y_t = 10 c + s_c t / 1000 + Σ_p a_cp (1 + 0.3 sin(2π t / 29 P)) sin(2π t / p + φ_cp) + n_t

      with P = period and p of P and 7 P (a day and a week of hours), slopes s uniform on [-1, 1],
      amplitudes a on [1/2, 3/2], phases φ on [0, 2π), and noise n_t = 0.7 n_{t-1} + 0.3 ε_t of
      normal ε;
    - `series:FILE`: a file of comma-separated numbers, a line for each step and a column for each
      series; a first line that is not of numbers is taken for names.

    Args:
      name: the source, as above.
      context_length: steps that a model reads.
      horizon: steps that it forecasts.
      period: of the made series, and of the baseline that repeats the last season.
      validation_fraction: in (0, 1), the share of the steps, the last ones, to hold out.
      **others: what belongs to other data; ignored.

    Returns:
      The `SeriesSet`.

    Raises:
      ValueError: a name of neither form, numbers out of range, a file that is not of finite numbers
        in columns, or series too short for a window on both sides of the split.
      FileNotFoundError: there is no such file.

    Example:
      >>> load_series("seasons").values.shape
      (4000, 3)
    """
    del others
    check_interval(0, 1, closed="neither", validation_fraction=validation_fraction)
    check_interval(1, np.inf, context_length=context_length, horizon=horizon, period=period)
    source, _, where = name.partition(":")
    if name == "seasons":
        values, description = _seasons(period), "seasons and noise"
    elif source == "series" and where:
        values, description = _read(Path(where).expanduser()), f"series of {where}"
    else:
        raise ValueError(f"the series must be 'seasons' or 'series:FILE', got {name!r}")
    split = len(values) - int(len(values) * validation_fraction)
    if min(split - context_length, len(values) - split) < horizon:
        raise ValueError(
            f"{description} must have at least context_length + horizon = "
            f"{context_length + horizon} steps to train on and horizon = {horizon} held out, got "
            f"{split} and {len(values) - split}"
        )
    mean, spread = values[:split].mean(axis=0), values[:split].std(axis=0)
    standardised = (values - mean) / np.where(spread > 0, spread, 1.0)
    return SeriesSet(
        standardised.astype(np.float32), split, context_length, horizon, period, description
    )


def _seasons(period: int, *, steps: int = 4000, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    t, c = np.arange(steps)[:, None], np.arange(channels)
    turns = 2 * np.pi * t
    values = 10 * c + rng.uniform(-1, 1, channels) * t / 1000
    for p in (period, 7 * period):
        amplitude = rng.uniform(0.5, 1.5, channels) * (1 + 0.3 * np.sin(turns / (29 * period)))
        values = values + amplitude * np.sin(turns / p + rng.uniform(0, 2 * np.pi, channels))
    noise = 0.3 * rng.normal(size=(steps, channels))
    for step in range(1, steps):
        noise[step] += 0.7 * noise[step - 1]
    return values + noise


def _read(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    lines = path.read_text().splitlines()
    try:
        _numbers(lines[:1])
    except ValueError:
        lines = lines[1:]
    try:
        values = np.array(_numbers(lines))
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers with commas between them: {error}") from error
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"{path} must hold finite numbers in columns, and as many in every line")
    return values


def _numbers(lines: list[str]) -> list[list[float]]:
    return [[float(number) for number in line.split(",")] for line in lines if line.strip()]
