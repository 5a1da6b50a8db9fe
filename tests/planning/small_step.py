"""A step of a small Llama, compiled for another machine."""

from sa_jax.config_files import load_config
from sa_jax.parallel.mesh import make_mesh
from sa_jax.planning.topology import open_topology
from sa_jax.training.plan import plan_architecture
from sa_jax.training.program import make_model, make_program

SIZES = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "head_dim": 128}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def small_config(**changes):
    """Four devices have copies of the weights; two rows each."""
    config = load_config("configs/llama.py:8b_insertion")
    config.architecture.update(SIZES)
    config.mesh.update(data=4, fsdp=1)
    config.update({"batch_size": 8, "sequence_length": 256, **changes})
    return config


def small_step(config, topology):
    """The text of the compiled step."""
    architecture = plan_architecture(config)
    mesh = make_mesh(**config.mesh, devices=open_topology(topology).devices)
    program = make_program(config, make_model(config, architecture, mesh), 10)
    return program.step.lower(*program.arguments).compile().as_text()


def assert_nothing_is_lost(topology):
    """No device but one starts a micro-batch's scatter at zeros instead of at the sum so far, and
    gradients of the embedding are added up over devices before they are added to that sum."""
    lines = small_step(small_config(accumulation=2), topology).splitlines()
    scatters = [line for line in lines if "scatter-add" in line]
    assert any(" scatter(" in line for line in scatters)
    assert not [line for line in scatters if " select(" in line]
