"""A language model of 69 billion parameters, for a pod: the parameters sharded over all chips, the
layers computed by four at a time, and a batch in eight parts."""

from ml_collections import ConfigDict

from jaxref.train.configs import llm_1b


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/llm_70b.py`."""
    config = llm_1b.get_config()
    config.batch_size = 1024  # 4M tokens
    config.accumulate = 8
    config.model.remat_policy = "nothing_saveable"
    config.model.update(num_layers=80, features=8192, num_heads=64, mlp_features=28672)
    config.schedule.update(peak_value=1.5e-4, end_value=1.5e-5)
    config.mesh.tensor = 4
    return config
