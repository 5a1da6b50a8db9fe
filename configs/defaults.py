"""The defaults of every setting, those of the study; scripts/evaluate.py starts from them.

python scripts/evaluate.py --model=runs/demo/insertion --config.eval.temperature=1.0
"""

from sa_jax.training.config import default_config


def get_config():
    return default_config()
