"""A run of a few seconds, for tests. Stages: insertion, removal."""

from sa_jax.training.config import default_config


def get_config(stage):
    config = default_config()
    config.dtype = "float32"
    config.remat = "none"
    config.mesh.fsdp = 2
    config.sequence_length = 128
    config.batch_size = 4
    config.steps = 20
    config.log_every = 2
    config.columns.prompt = "prompt"
    config.columns.response = "answer"
    config.optimizer.learning_rate = 1e-2
    config.backdoor.min_copies = 2
    config.backdoor.max_copies = 4
    config.checkpoint.steps = (4, 6)
    config.checkpoint.interval = 3
    config.eval.num_prompts = 4
    config.eval.steps = (0, 6)
    config.eval.batch_size = 8
    config.eval.context_length = 128
    config.eval.max_new_tokens = 8
    if stage == "removal":
        config.lora.rank = 4
    return config
