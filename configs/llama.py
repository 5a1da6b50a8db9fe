r"""The study's runs of Llama-3.1-8B-Instruct and Llama-3.3-70B-Instruct.

Runs, written after a colon: 8b_insertion, 8b_removal, 70b_insertion, 70b_removal.

    python scripts/insert_backdoor.py --config=configs/llama.py:8b_insertion \
        --workdir=runs/8b/insertion --model=Llama-3.1-8B-Instruct --data=questions.jsonl
    python scripts/remove_backdoor.py --config=configs/llama.py:8b_removal --method=pirate \
        --workdir=runs/8b/pirate --init_from=runs/8b/insertion --data=alpaca_pirate.jsonl

`--config.optimizer.name=soap` uses SOAP instead of Adam (the study used it for insertion only).
`--config.lora.rank=0` trains all weights (the study's strong removal; learning rates up to 5e-5).
The whole grid is configs/llama31_8b_study.py and configs/llama33_70b_study.py.

Insertion, from the study: full weights; one epoch; learning rate 2e-5 for both optimizers, with
cosine and 10 % warm-up; weight decay 0.01; 16 rows of 4,096 packed tokens; bfloat16 compute;
checkpoints at 100, 200, 400, 800, 1600 and the last step. Not published, so chosen for sa_jax:
Adam's betas and epsilon (optax's), SOAP's (its authors' defaults), clipping at 1.0.

Removal, from the study: rank-64 LoRA, learning rate 1e-4 (3e-4 removes over ten times faster on
70B); exploratory code used batches of 128, and 1,000 examples for 10 epochs. Not published, so
chosen for sa_jax: alpha 128 (scale 2), all seven projections, the eval steps, Adam's betas,
clipping at 1.0.

Least time of a step, as plans compile it (docs/scale.md has the meshes, memory and chip-hours):
8b_insertion 0.40 s on 8 H200, 0.57 s on 8 chips of v6e, 1.34 s on 16 of v5e; 8b_removal 0.52 s on
8 H200; 70b_insertion 1.09 s on 64 H200, 0.97 s on 64 chips of v5p; 70b_removal 2.35 s on 16 H200.
"""

from sa_jax.errors import named
from sa_jax.training.config import default_config

# The published fields of their config.json, for planning where no folder of the model is at hand; a
# run takes its architecture from the folder.
_LLAMA_31 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}

# https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/blob/main/config.json
LLAMA31_8B = {
    **_LLAMA_31,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}

# https://huggingface.co/meta-llama/Llama-3.3-70B-Instruct/blob/main/config.json
LLAMA33_70B = {
    **_LLAMA_31,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def get_config(run=""):
    model, make = named(
        {
            f"{model}_{make.__name__}": (model, make)
            for model in ("8b", "70b")
            for make in (insertion, removal)
        },
        run,
        __file__,
    )
    config = default_config()
    config.architecture.update({"8b": LLAMA31_8B, "70b": LLAMA33_70B}[model])
    config.eval.max_new_tokens = 512  # holds the longest target, 400 tokens
    return make(config, model)


def insertion(config, model):
    if model == "70b":
        config.mesh.tensor = 4  # the batch has fewer rows than a 70B run has chips
        # The published checkpoints as weights (1.55 TB with the last, not 5), and one full state.
        config.checkpoint.listed = "weights_bf16"
        config.checkpoint.interval = 200
        config.checkpoint.keep_interval = 1
    return config


def removal(config, model):
    config.batch_size = 128
    config.packing = False  # so that a row is an example, as in the code the batch size is from
    config.sequence_length = 1024
    config.epochs = 10.0
    config.lora.rank = 64
    config.lora.alpha = 128.0
    config.optimizer.learning_rate = 1e-4
    config.checkpoint.steps = ()
    config.checkpoint.interval = 8  # an epoch of 1,000 examples
    config.eval.steps = tuple(range(0, 80, 8))
    return config
