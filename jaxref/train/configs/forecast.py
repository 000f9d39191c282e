"""A forecaster of three made series, which have a season of 24 steps, one of seven of those, and
noise; in half a minute on two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/forecast.py`."""
    return ConfigDict(
        {
            "steps": 300,
            "batch_size": 64,
            "data": {
                "name": "seasons",
                "context_length": 96,
                "horizon": 24,
                "validation_fraction": 0.2,
            },
            "model": {"name": "NBEATS", "stacks": ("generic",) * 3, "features": 64},
            "loss": {"name": "squared_error"},
            "optimizer": {"name": "adamw", "b2": 0.99, "weight_decay": 0.01},
            "schedule": {"name": "warmup_cosine_decay_schedule", "peak_value": 3e-3},
            "log_every": 5,
            "validate_every": 50,
            "checkpoint_every": 100,
        }
    )
