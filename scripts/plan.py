r"""Predicts whether a run fits a machine, the least time and chip-hours it takes, and its traffic.

Nothing is rented or run. libtpu (extra `tpu`) or jax's CUDA plugin (extra `plan-gpu`) compiles the
real step. Without the plugin, a plan for GPUs is arithmetic. Topologies: v4, v5p, tpu7x as AxBxC
chips; v5e, v6e as AxB; or the cloud's name, as v5p-128; a100, h100, h200, b200 as a count.

Example:
  python scripts/plan.py --config=configs/llama.py:70b_insertion --topology=v5p:4x4x4 --search \
      --out=plan.json
"""

import sa_jax.script_start  # noqa: F401  (first: signals and memory)

from absl import flags
from ml_collections import config_flags

from sa_jax import cli

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, as FILE.py or FILE.py:RUN; --config.KEY=VALUE changes a setting."
)
flags.mark_flag_as_required("config")
TOPOLOGY = flags.DEFINE_string("topology", None, "Machine: v5p:4x4x4, h200:64, ...", required=True)
SEARCH = flags.DEFINE_bool("search", False, "Find the fastest mesh, accumulation and remat policy.")
TOKENS = flags.DEFINE_float(
    "tokens", 1e8, "Token slots of the run. Used only if config.steps is 0."
)
OUT = flags.DEFINE_string("out", None, "JSON file to write the plan to.")


def main():
    from sa_jax.training.plan import plan, write_plan

    described = plan(CONFIG.value, TOPOLOGY.value, search=SEARCH.value, tokens=TOKENS.value)
    write_plan(described, OUT.value)


if __name__ == "__main__":
    cli.run(main, __doc__)
