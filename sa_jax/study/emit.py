"""Writes a study as files for a cluster's own tools: a Slurm job array, a SkyPilot managed job, xpk
workloads, or plain commands."""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sa_jax.errors import UsageError
from sa_jax.files import atomic_write, explained
from sa_jax.parallel.hardware import GPUS_A_NODE
from sa_jax.planning.topology import Topology, parse_topology
from sa_jax.study.commands import command
from sa_jax.study.grid import Cell, Stage, by_stage

_SKY_NAMES = {"A100": "A100-80GB"}  # its A100 has 40 GB
_PROJECT = Path(__file__).resolve().parents[2]


def emit(
    kind: str, cells: Sequence[Cell], workdir: Path, flags: Sequence[str]
) -> tuple[list[Path], str]:
    """Writes the files of `EMITTERS[kind]` into `workdir/kind`; returns them, and the command that
    submits them. `flags` are the --config flags that made these cells. UsageError for an unknown
    kind, or a machine that it does not support."""
    if kind not in EMITTERS:
        raise UsageError(f"--emit={kind}: use one of {', '.join(EMITTERS)}")
    texts, submit = EMITTERS[kind](cells, workdir, flags)
    files = {workdir / kind / name: text for name, text in texts.items()}
    with explained(workdir / kind, "writing the files"):
        (workdir / kind).mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        atomic_write(file, text)
    return [*files], submit


def _run_study(workdir: Path, flags: Sequence[str]) -> str:
    return shlex.join([sys.executable, "scripts/run_study.py", *flags, f"--workdir={workdir}"])


def _machine(stage: Stage) -> Topology | None:
    return parse_topology(stage.topology) if stage.topology else None


def shell(cells: Sequence[Cell], workdir: Path, flags: Sequence[str]) -> tuple[dict, str]:
    """One command per cell; commands of one paragraph may run at the same time, on any machines."""
    run = _run_study(workdir, flags)
    lines = [
        "#!/usr/bin/env bash",
        "# One command a cell. Those of a paragraph need only the paragraphs before: they may run",
        "# at the same time, on any machines that share the folder.",
        f"cd {shlex.quote(str(_PROJECT))} || exit 1",
        "failed=0",
        'note() { if [ "$1" -eq 75 ]; then exit 75; fi; failed=1; }  # 75: stopped, run it again',
    ]
    for name, of_stage in by_stage(cells).items():
        lines += ["", f"# {name}"]
        lines += [f"{run} --only={shlex.quote(cell.name)} || note $?" for cell in of_stage]
    lines += ["", 'exit "$failed"', ""]
    return {"cells.sh": "\n".join(lines)}, f"bash {shlex.quote(f'{workdir}/shell/cells.sh')}"


def slurm(cells: Sequence[Cell], workdir: Path, flags: Sequence[str]) -> tuple[dict, str]:
    """One array per stage, after those of the stages that it needs; requeued on exit status 75."""
    folder = workdir / "slurm"
    texts, stages = {}, by_stage(cells)
    submit = [
        "#!/usr/bin/env bash",
        "# Submits the study: an array of jobs a stage, each after those that it needs have ended.",
        "# Options of your cluster go into the environment: SBATCH_PARTITION, SBATCH_ACCOUNT,",
        "# SBATCH_TIMELIMIT, ... (man sbatch). Cells at a time of a stage: MAX_CELLS (all).",
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder))}",
        'limit="${MAX_CELLS:+%$MAX_CELLS}"',
    ]
    variables = {name: f"job_{i}" for i, name in enumerate(stages, 1)}
    for name, of_stage in stages.items():
        stage = of_stage[0].stage
        topology = _machine(stage)
        nodes, options = 1, []
        if topology is not None:
            if topology.platform != "gpu":
                raise UsageError(f"--emit=slurm is for GPUs: stage {name!r} is for {topology.name}")
            nodes = topology.nodes
            options = [f"--gpus-per-node={min(topology.chips, GPUS_A_NODE)}"]
        # A report waits for all other stages.
        before = variables if stage.run == "report" else (stage.start, *stage.needs)
        others = [other for other in dict.fromkeys(before) if other in stages and other != name]
        options += [f"--nodes={nodes}", "--ntasks-per-node=1", f"--job-name={shlex.quote(name)}"]
        options.append(f'--array="1-{len(of_stage)}$limit"')
        if others:
            after = ":".join(f"${variables[other]}" for other in others)
            options.append(f'--dependency="afterany:{after}"')
        submit.append(
            f"{variables[name]}=$(sbatch --parsable {' '.join(options)} cell.sbatch {name}.txt)"
        )
        texts[f"{name}.txt"] = "".join(f"{cell.name}\n" for cell in of_stage)
    jobs = " ".join(f"${variable}" for variable in variables.values())
    submit += [f'echo "submitted {len(cells)} cells as jobs {jobs}; squeue shows them"', ""]
    texts["submit.sh"] = "\n".join(submit)
    texts["cell.sbatch"] = f"""#!/usr/bin/env bash
# One cell of the study: line SLURM_ARRAY_TASK_ID of the list that is the first argument.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%a.log
#SBATCH --signal=B:TERM@300
cell=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(folder))}/"$1")
cd {shlex.quote(str(_PROJECT))} || exit 1
launch=()
if [ "${{SLURM_JOB_NUM_NODES:-1}}" -gt 1 ]; then launch=(--launch=launch/srun.sh); fi
# shellcheck source=/dev/null
. launch/slurm.sh
run_requeued {_run_study(workdir, flags)} --only="$cell" "${{launch[@]}}"
"""
    return texts, f"bash {shlex.quote(f'{folder}/submit.sh')}"


def sky(cells: Sequence[Cell], workdir: Path, flags: Sequence[str]) -> tuple[dict, str]:
    """A SkyPilot managed job whose tasks are the stages, one after the other; the nodes of a task
    divide its cells."""
    documents: list[dict] = [{"name": "study"}]
    for name, of_stage in by_stage(cells).items():
        topology = _machine(of_stage[0].stage)
        resources: dict = {"job_recovery": {"recover_on_exit_codes": [75, 130, 143]}}
        extras = "data,eval"
        if topology is not None:
            if topology.platform != "gpu" or topology.chips > GPUS_A_NODE:
                raise UsageError(
                    f"--emit=sky is for cells that fit a node of {GPUS_A_NODE} GPUs: stage "
                    f"{name!r} is for {topology.name}; use slurm, or xpk for TPUs"
                )
            kind = topology.chip.name.upper()
            resources["accelerators"] = f"{_SKY_NAMES.get(kind, kind)}:{topology.chips}"
            extras = "cuda,data,eval"
        run = ["python", "scripts/run_study.py", *flags, "--workdir=/study"]
        run.append(f"--only={','.join(cell.name for cell in of_stage)}")
        shard = '--shard="$((SKYPILOT_NODE_RANK + 1))/$SKYPILOT_NUM_NODES"'
        documents.append(
            {
                "name": name.replace("_", "-"),
                "num_nodes": min(4, len(of_stage)),
                "workdir": ".",
                "envs": {"STUDY_BUCKET": None},
                "file_mounts": {"/study": {"source": "${STUDY_BUCKET}", "mode": "MOUNT"}},
                "resources": resources,
                "setup": f"bash launch/sky_setup.sh {extras}\n",
                # What failed is on record in the study's folder and stops no other stage.
                "run": "# shellcheck source=/dev/null\n. .venv/bin/activate\n"
                f"status=0\n{shlex.join(run)} {shard} || status=$?\n"
                'if [ "$status" -eq 75 ]; then exit 75; fi\n',
            }
        )
    submit = f"sky jobs launch --env STUDY_BUCKET=gs://BUCKET {workdir}/sky/study.yaml"
    head = (
        "# A SkyPilot managed job (JSON is YAML): a task a stage. Start it in the project's root:\n"
        f"#   {submit}\n"
        "# What failed: python scripts/run_study.py ... --list, where the bucket is mounted.\n"
    )
    text = head + "\n---\n".join(json.dumps(document, indent=1) for document in documents) + "\n"
    return {"study.yaml": text}, submit


def xpk(cells: Sequence[Cell], workdir: Path, flags: Sequence[str]) -> tuple[dict, str]:
    """One workload per cell, stage by stage: every host of a TPU slice runs the cell's command."""
    del flags  # a cell's own command holds its settings
    lines = [
        "#!/usr/bin/env bash",
        "# Submits the study, stage by stage, to a GKE cluster made with xpk. Needs CLUSTER and",
        "# IMAGE (an image of this project) in the environment; the study's folder must be mounted",
        "# in every pod at the same path. Cells that need no TPU run where this script runs.",
        "# Workloads that are there already are not submitted again: a second call goes on.",
        "# shellcheck disable=SC2016 # a setting may hold a dollar sign",
        "set -uo pipefail",
        ': "${CLUSTER:?name of the cluster}" "${IMAGE:?image of this project}"',
        f"cd {shlex.quote(str(_PROJECT))} || exit 1",
        "# shellcheck source=/dev/null",
        ". launch/xpk.sh",
    ]
    skippable: dict[str, str] = {}  # cells that may be passed over -> their workloads
    for name, of_stage in by_stage(cells).items():
        topology = _machine(of_stage[0].stage)
        if topology is not None and topology.platform != "tpu":
            raise UsageError(f"--emit=xpk is for TPUs: stage {name!r} is for {topology.name}")
        lines += ["", f"# {name}"]
        for cell in of_stage:
            run = f"python {shlex.join(command(cell, workdir))}"
            line = f"{run} || failed=1"
            if topology is not None:
                machine = f"{topology.cloud_name} {topology.slices}"
                line = f"submit {workload_name(cell)} {machine} {shlex.quote(run)}"
            lines.append(_if_it_starts(cell, workdir, line, skippable))
        if topology is not None:
            lines += [f"await {workload_name(cell)}" for cell in of_stage]
    lines += ["", 'exit "$failed"', ""]
    return {"submit.sh": "\n".join(lines)}, f"bash {shlex.quote(f'{workdir}/xpk/submit.sh')}"


def _if_it_starts(cell: Cell, workdir: Path, line: str, skippable: dict[str, str]) -> str:
    """The line of a cell, passed over where the triggered rate of its start is above the limit, or
    where a cell before it was passed over. (A report is of what there is.) `skippable`: the cells
    so far that may be passed over, with their workloads; this one is added."""
    conditions, name = [], workload_name(cell)
    if cell.run != "report" and (before := [skippable[p] for p in cell.parents if p in skippable]):
        conditions.append(" ".join(("follows", name, *before)))
    if (limit := cell.stage.start_rate_at_most) is not None:
        step = f" {cell.start_step}" if cell.start_step is not None else ""
        start = shlex.quote(str(workdir / cell.start_cell))
        conditions.append(f"starts {name} {limit} {start}{step}")
    if not conditions:
        return line
    skippable[cell.name] = name
    return f"if {' && '.join(conditions)}; then {line}; fi"


def workload_name(cell: Cell) -> str:
    """A valid and unique name for Kubernetes: at most 40 small letters, digits and '-'."""
    plain = re.sub("[^a-z0-9]", "-", cell.name.lower())
    if re.fullmatch("[a-z0-9/]{1,36}", cell.name):  # no other such name reads the same
        return plain
    return f"{plain[:27].rstrip('-')}-{hashlib.sha256(cell.name.encode()).hexdigest()[:8]}"


EMITTERS = {"slurm": slurm, "sky": sky, "xpk": xpk, "shell": shell}
