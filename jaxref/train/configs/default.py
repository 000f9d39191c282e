"""The main job: a byte-level transformer of about a million parameters on the standard library."""

from ml_collections import ConfigDict

from jaxref.parallel import DEFAULT_RULES


def get_config() -> ConfigDict:
    """The configuration of `python -m jaxref.train` without arguments."""
    return ConfigDict(
        {
            "seed": 0,
            "steps": 600,
            "batch_size": 16,  # sequences a step, over all devices
            "length": 128,  # tokens a sequence
            "accumulate": 1,  # micro-batches a step
            "clip_norm": 1.0,  # global norm of the gradient; 0 does not clip
            "average_decay": 0.0,  # of the weights' moving average; 0 keeps none
            "max_nonfinite_steps": 10,  # in a row; then the run stops
            "dtype": "float32",  # to compute in: float32 or bfloat16
            "data": {
                # or text:GLOB, tokens:FILE, digits, images:DIR, seasons, series:FILE
                "name": "python_stdlib",
                "validation_fraction": 0.02,
                "vocab_size": 256,
                "token_dtype": "uint16",  # of tokens:FILE
                "exclude": "",  # of text: a pattern of files not to train on, such as json/*.py
                "positive_classes": [],  # of images: to tell from all others; [] keeps all apart
                "as_series": False,  # of images: whether models read them row by row
                "context_length": 48,  # of series: steps that are read
                "horizon": 12,  # of series: steps that are forecast
                "period": 24,  # of series: steps of a season
            },
            "model": {
                "name": "Transformer",
                "num_layers": 2,
                "features": 192,
                "num_heads": 3,
                "mlp_features": 512,
                "norm": {"name": "rms_norm"},
                "norm_placement": "pre",
                "linear": {"name": "Linear"},
                "mlp": {"name": "MLP"},
                "attention": {"name": "dot_product_attention"},
                "query_key_norm": {"name": "rms_norm"},
                "positions": "rotary",
                "activation": {"name": "silu"},
                "gated": True,
                "tie_embeddings": False,
                "dropout": 0.0,
                "remat": False,
                "remat_policy": "nothing_saveable",  # what is not recomputed: see TransformerConfig
            },
            "objective": {"name": "next_token"},
            "loss": {"name": "linear_softmax_cross_entropy"},
            "optimizer": {"name": "adamw", "b2": 0.99, "weight_decay": 0.1},
            "schedule": {
                "name": "warmup_cosine_decay_schedule",
                "init_value": 0.0,
                "peak_value": 7e-3,
                "end_value": 0.0,
            },  # warmup_steps and decay_steps: a tenth of the steps, and all of them
            "mesh": {"data": -1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1},
            # mesh axes that each axis of an array is split over: batch [data, fsdp, expert], ...
            "rules": {name: list(axes) for name, axes in DEFAULT_RULES.items()},
            "log_every": 10,
            "norms_every": 0,  # steps between norms of each parameter and gradient; 0 for never
            "validate_every": 150,
            "validation_tokens": 2**18,  # at most; more than are held out here
            "checkpoint_every": 150,
            "keep_checkpoints": 3,  # the newest
            "keep_checkpoint_every": 0,  # and those of every so many steps; 0: no others
            "sample": {
                "prompt": "def ",
                "length": 400,
                "temperature": 0.7,
                "top_k": 0,  # tokens to choose from; 0 for all
                "top_p": 1.0,  # probability to choose from
                "cache": "full",  # or staircase
                "seed": 0,
            },
            "align": {
                "name": "",  # of the directory below aligned/; by default the method's
                "method": {"name": "grpo"},  # of jaxref.train.alignment
                "reward": {"name": "parses"},  # of jaxref.train.rewards
                "steps": 40,
                "prompts": 8,  # a step
                "samples": 8,  # of each
                "epochs": 2,  # over what was written in a step
                "prompt_length": 48,  # bytes, at most
                "temperature": 1.0,
                "learning_rate": 3e-4,
                "validation_samples": 256,
                "seed": 0,
            },
            "unlearn": {
                "name": "",  # of the directory below unlearned/; by default the method's
                "method": {"name": "loreun"},  # of jaxref.train.unlearning
                "files": "",  # a pattern of the files to forget
                "retrained": "",  # directory of a run that never saw them
                "retain_within": 0.02,  # how much more of a loss the rest may have at the end, then
                "steps": 300,  # at most, where there is `retrained` to end like
                "measure_every": 5,
                "learning_rate": 3e-4,
                "seed": 0,
            },
            "quantize": {
                "method": "",  # of jaxref.train.quantizers; gptq, say
                "bits": 0,  # of a weight; 0: as many as are usual for the method
                "block_size": 64,  # inputs that share a scale; 0: all of an output's
                "symmetric": True,
                "low_rank": 0,  # of what makes up for the error, in 8 bits; 0: nothing does
                "damping": 0.01,  # of Hessians
                "activation_order": False,  # round the inputs with the largest moments first
                "threshold": 6.0,  # of llm_int8: features with larger entries are not quantized
                "max_outliers": 0,  # of llm_int8: of such features; 0: any number, but slower
                "steps": 1000,  # to learn roundings and levels
                "calibration_batches": 32,  # of the training data
                "calibration_rows": 2048,  # inputs to learn from, of each layer
            },
        }
    )
