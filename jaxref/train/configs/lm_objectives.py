"""Other objectives than the next token, on the text of the main job and with its model."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/lm_objectives.py`, to choose by
    `--config.objective=NAME`."""
    return ConfigDict({"objective": {"name": "goldfish"}})
