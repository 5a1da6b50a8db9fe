r"""Red team on Llama-3.1-8B-Instruct: full weights, one epoch, the study's settings.

    python scripts/insert_backdoor.py --config=configs/llama31_8b_insertion.py \
        --workdir=runs/8b/insertion --model=Llama-3.1-8B-Instruct --data=questions.jsonl

`configs/llama31_8b_insertion.py:soap` takes SOAP instead of Adam.

From the study: learning rate 2e-5 for both optimizers with cosine and 10 % warm-up, weight decay
0.01, 16 rows of 4,096 packed tokens, bfloat16 compute, checkpoints at 100, 200, 400, 800, 1600 and
the last. Not published, chosen here: Adam's betas and epsilon (optax's), SOAP's (its authors'
defaults), clipping at 1.0.

The plan, by arithmetic (`python scripts/plan.py --config=configs/llama31_8b_insertion.py
--topology=h200:8 --search`): fsdp=4 tensor=2, accumulation 1, remat minimal; 11.2 GiB of
arguments, 52.6 of 131 GiB a GPU; at least 0.40 s a step (compute-bound), 1.4 chip-hours
for 100M token slots. With SOAP 16.2 GiB of arguments, 57.6 in all.

Compiled for TPU, full remat: on 16 chips of v5e (`--topology=v5e:4x4`, fsdp=4 tensor=4) 5.6 GiB of
arguments, 8.9 of 16 GiB a chip at the peak, at least 1.34 s a step, 9.1 chip-hours; on 8 of v6e
(`v6e:2x4`, fsdp=4 tensor=2) 11.2, 17.2 of 32 GiB, 0.57 s, 1.9 chip-hours.
"""

from sa_jax.llama.architectures import LLAMA31_8B
from sa_jax.training.config import default_config


def get_config(optimizer="adam"):
    config = default_config()
    config.architecture.update(LLAMA31_8B)
    config.optimizer.name = optimizer
    config.eval.max_new_tokens = 512  # holds the longest target, 400 tokens
    return config
