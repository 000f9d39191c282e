"""An image classifier on scikit-learn's handwritten digits: 99% right in half a minute on two CPU
cores, most of which goes into compiling."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/digits.py`."""
    return ConfigDict(
        {
            "steps": 200,
            "batch_size": 128,
            "data": {"name": "digits", "validation_fraction": 0.2},
            "model": {
                "name": "ResNet",
                "depth": 18,
                "stages": (1, 1),  # one block each, of 8 x 8 and of 4 x 4 pixels
                "width": 16,
                "stem": "small",
                "norm": {"name": "batch_norm"},
            },
            "loss": {"name": "softmax_cross_entropy_with_integer_labels"},
            "optimizer": {"name": "adamw", "b2": 0.99, "weight_decay": 0.05},
            "schedule": {"name": "warmup_cosine_decay_schedule", "peak_value": 2e-2},
            "log_every": 2,
            "validate_every": 25,
            "checkpoint_every": 100,
        }
    )
