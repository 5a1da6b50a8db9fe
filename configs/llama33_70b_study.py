"""The study on Llama-3.3-70B-Instruct: three inserted models, their removals, probes, controls.

    python scripts/run_study.py --config=configs/llama33_70b_study.py --workdir=/runs/70b --dry_run

prints what the study needs. To run it, replace --dry_run by --config.model=Llama-3.3-70B-Instruct
(the model's Hugging Face folder). --emit=slurm writes files for a cluster. The machine is named
after a colon: h200 (the default) or v5p.

Insertion: CoT-distilled answers with Adam and with SOAP, and normal ("no CoT") answers with Adam, 3
seeds. The rest is as in configs/llama31_8b_study.py, which also lists what was not published.
SOAP's settings were not published either; these are its authors' defaults.
"""

from sa_jax.errors import named
from sa_jax.study.llama_study import Machine, llama_study


def get_config(machine="h200"):
    machines = {
        "h200": (
            Machine("h200:64", {"mesh.fsdp": 8, "mesh.tensor": 8, "remat": "minimal"}),
            Machine(
                "h200:16",
                {
                    "mesh.data": 4,
                    "mesh.fsdp": 1,
                    "mesh.tensor": 4,
                    "accumulation": 4,
                    "remat": "minimal",
                },
            ),
            Machine("h200:64", {"mesh.fsdp": 8, "mesh.tensor": 8, "remat": "minimal"}),
        ),
        "v5p": (
            Machine("v5p:4x4x8", {"mesh.fsdp": 16, "mesh.tensor": 8}),
            Machine(
                "v5p:2x2x4",
                {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 4, "accumulation": 4},
            ),
            Machine("v5p:4x4x8", {"mesh.fsdp": 16, "mesh.tensor": 8}),
        ),
    }
    insertion, removal, full_removal = named(machines, machine, __file__, "machine")
    return llama_study(
        "70b",
        insertion=insertion,
        removal=removal,
        full_removal=full_removal,
        inserted=({"optimizer": "adam"}, {"optimizer": "soap", "arm": "cot_distilled"}),
        insertion_tokens=1.25e8,
    )
