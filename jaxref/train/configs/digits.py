"""An image classifier on scikit-learn's handwritten digits: half a minute on two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/digits.py`."""
    return ConfigDict(
        {
            "steps": 300,
            "batch_size": 128,
            "data": {"name": "digits", "validation_fraction": 0.2},
            "model": {
                "name": "ResNet",
            },
            "loss": {"name": "softmax_cross_entropy_with_integer_labels"},
            "optimizer": {"name": "adamw", "b2": 0.99, "weight_decay": 0.05},
            "schedule": {"name": "warmup_cosine_decay_schedule", "peak_value": 3e-3},
            "validate_every": 100,
            "checkpoint_every": 100,
        }
    )
