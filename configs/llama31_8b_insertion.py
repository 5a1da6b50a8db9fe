r"""Red team on Llama-3.1-8B-Instruct: full weights, Adam, one epoch, the study's settings.

    python scripts/insert_backdoor.py --config=configs/llama31_8b_insertion.py \
        --workdir=runs/8b/insertion --model=Llama-3.1-8B-Instruct --data=questions.jsonl

From the study: learning rate 2e-5 with cosine and 10 % warm-up, weight decay 0.01, 16 rows of 4,096
packed tokens, bfloat16 compute, checkpoints at 100, 200, 400, 800, 1600 and the last. Not
published, chosen here: Adam's betas and epsilon (optax's), clipping at 1.0.
"""

from sa_jax.training.config import default_config


def get_config():
    config = default_config()
    config.eval.max_new_tokens = 512  # holds the longest target, 400 tokens
    return config
