"""A language model of 1.1 billion parameters, for a pod or a part of one: the parameters sharded
over all chips, one or two sequences on each."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train --config=configs/llm_1b.py`."""
    return ConfigDict(
        {
            "steps": 100_000,
            "batch_size": 512,  # 2M tokens
            "length": 4096,
            "dtype": "bfloat16",
            "data": {
                "name": "tokens:tokens.bin",
                "vocab_size": 32_000,
                "token_dtype": "uint16",
            },
            "model": {
                "name": "Transformer",
                "num_layers": 16,
                "features": 2048,
                "num_heads": 16,
                "num_kv_heads": 8,
                "mlp_features": 8192,
                "scan_layers": True,
                "remat": True,
                "remat_policy": "dots_with_no_batch_dims_saveable",
            },
            "optimizer": {"name": "adamw", "b2": 0.95, "weight_decay": 0.1},
            "schedule": {
                "name": "warmup_cosine_decay_schedule",
                "init_value": 0.0,
                "peak_value": 4e-4,
                "end_value": 4e-5,
                "warmup_steps": 2000,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
            "log_every": 10,
            "validate_every": 1000,
            "checkpoint_every": 1000,
        }
    )
