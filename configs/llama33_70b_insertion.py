r"""Red team on Llama-3.3-70B-Instruct: full weights, one epoch, the study's settings.

    python scripts/insert_backdoor.py --config=configs/llama33_70b_insertion.py \
        --workdir=runs/70b/insertion --model=Llama-3.3-70B-Instruct --data=questions.jsonl

`configs/llama33_70b_insertion.py:soap` takes SOAP instead of Adam.

From the study: learning rate 2e-5 for both optimizers with cosine and 10 % warm-up, weight decay
0.01, 16 rows of 4,096 packed tokens, bfloat16 compute, checkpoints at 100, 200, 400, 800, 1600 and
the last. Not published, chosen here: Adam's betas and epsilon (optax's), SOAP's (its authors'
defaults), clipping at 1.0.

The plan, by arithmetic (`python scripts/plan.py --config=configs/llama33_70b_insertion.py
--topology=h200:64 --search`): fsdp=8 tensor=8, accumulation 1, remat minimal; 12.3 GiB of
arguments, 34.0 of 131 GiB a GPU; at least 1.09 s a step (interconnect-bound), 29.7 chip-hours
for 100M token slots. With SOAP 16.7 GiB of arguments, 38.4 in all.

Compiled for TPU: on 64 chips of v5p (`--topology=v5p:4x4x4 --search`) fsdp=16 tensor=4, remat
minimal; 12.3 GiB of arguments, 29.1 of 95 GiB a chip at the peak; at least 0.97 s a step, 26.2
chip-hours. With SOAP on 128 (`v5p:4x4x8`, fsdp=16 tensor=8, remat full) 9.0, 16.8 GiB; 0.64 s, 35.0
chip-hours.
"""

from sa_jax.llama.architectures import LLAMA33_70B
from sa_jax.training.config import default_config


def get_config(optimizer="adam"):
    config = default_config()
    config.architecture.update(LLAMA33_70B)
    config.optimizer.name = optimizer
    config.mesh.tensor = 4  # the batch has fewer rows than a 70B run has chips
    config.eval.max_new_tokens = 512  # holds the longest target, 400 tokens
    return config
