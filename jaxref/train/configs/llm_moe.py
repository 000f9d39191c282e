"""A mixture of experts of 47 billion parameters, of which each token is computed with 13: in every
layer eight experts, over eight chips, and all parameters sharded over all chips."""

from ml_collections import ConfigDict

from jaxref.train.configs import llm_7b


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/llm_moe.py`."""
    config = llm_7b.get_config()
    config.model.mlp = {
        "name": "MixtureOfExperts",
        "num_experts": 8,
        "top_k": 2,
        "group_size": 512,  # tokens that compete for places: the dispatch grows with it
    }
    config.mesh.expert = 8
    return config
