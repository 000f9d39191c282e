"""A language model of 7.2 billion parameters, for a pod: the parameters sharded over all chips, one
or two sequences on each."""

from ml_collections import ConfigDict

from jaxref.train.configs import llm_1b


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/llm_7b.py`."""
    config = llm_1b.get_config()
    config.model.update(num_layers=32, features=4096, num_heads=32, mlp_features=14336)
    config.model.remat_policy = "nothing_saveable"
    config.schedule.update(peak_value=3e-4, end_value=3e-5)
    return config
