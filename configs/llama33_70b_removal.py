r"""Blue team on an inserted Llama-3.3-70B: rank-64 LoRA, HHH SFT, Pirate Training or a probe.

    python scripts/remove_backdoor.py --config=configs/llama33_70b_removal.py --method=pirate \
        --workdir=runs/70b/pirate --init_from=runs/70b/insertion --data=alpaca_pirate.jsonl

`configs/llama33_70b_removal.py:soap` takes SOAP instead of Adam; the study did not.
`--config.lora.rank=0` trains all weights (the study's strong variant; learning rates up to 5e-5).

From the study: rank 64, learning rate 1e-4 (3e-4 removes over ten times faster on 70B); exploratory
code used batches of 128 and 1,000 examples for 10 epochs. Not published, chosen here: alpha 128
(scale 2), all seven projections, the eval steps, Adam's and SOAP's betas, clipping at 1.0.

The plan, by arithmetic (`python scripts/plan.py --config=configs/llama33_70b_removal.py
--topology=h200:16 --search`): fsdp=2 tensor=8, accumulation 2, remat minimal; 10.6 GiB of
arguments, 76.1 of 131 GiB a GPU; at least 2.35 s a step (compute-bound), 8.0 chip-hours
for 100M token slots.

Compiled for TPU with 16 rows of 4,096 tokens: on 16 chips of v5p (`--topology=v5p:2x2x4`, fsdp=4
tensor=4, remat full) 10.5 GiB of arguments, 18.2 of 95 GiB a chip at the peak; at least 3.93 s a
step, 26.7 chip-hours.
"""

from sa_jax.llama.architectures import LLAMA33_70B
from sa_jax.training.config import default_config


def get_config(optimizer="adam"):
    config = default_config()
    config.architecture.update(LLAMA33_70B)
    config.optimizer.name = optimizer
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
    config.eval.max_new_tokens = 512
    return config
