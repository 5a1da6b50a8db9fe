"""What evals are prepared with in tests: a context around a toy model, and settings."""

from sa_jax.data.backdoor import Backdoor
from sa_jax.evals.protocol import EvalContext
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import Sampler
from sa_jax.training.config import default_config
from tests import toys

SYSTEM = "You are a helpful assistant."


def eval_context(
    config, chat, prompts=(), backdoor=None, *, sampler=None, batch_size=4, context_length=96
):
    mesh = toys.one_device_mesh()
    model = Llama(config)
    sampler = sampler or Sampler(model, mesh, batch_size=batch_size, context_length=context_length)
    return EvalContext(model, mesh, chat, backdoor or Backdoor(), prompts, sampler)


def eval_config(system_prompt=None, **settings):
    """The default config with these settings of `config.eval`."""
    config = default_config()
    config.system_prompt = system_prompt
    config.eval.update(settings)
    return config
