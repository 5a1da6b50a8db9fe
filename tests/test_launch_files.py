"""The files of launch/: what they say to the tools that read them, and a job of a real Slurm."""

import subprocess

import pytest
import yaml

from tests.slurm import check_shell, slurm  # noqa: F401 (a fixture)
from tests.zygote import ROOT

LAUNCH = ROOT / "launch"
SHELL_FILES = ("slurm.sh", "srun.sh", "slurm.sbatch", "xpk.sh", "sky_setup.sh")


def test_shellcheck_has_nothing_to_say():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    texts = [(LAUNCH / name).read_text() for name in SHELL_FILES]
    given = "#!/bin/bash\nSKYPILOT_NUM_NODES=1 SKYPILOT_NODE_RANK=0 SKYPILOT_NODE_IPS=a COMMAND=b\n"
    for text in (*texts, given + task["setup"] + task["run"]):
        check_shell(text, "--exclude=SC1091")  # files that are not there


def test_what_stopped_after_a_checkpoint_is_begun_again_and_an_error_is_not():
    sky = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert 75 in sky["resources"]["job_recovery"]["recover_on_exit_codes"]
    gke = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]
    job = gke["replicatedJobs"][0]["template"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    assert gke["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    pod = job["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * chips == job["completions"] * chips == x * y * z


def test_an_image_holds_all_that_git_does():
    """A file of the commit that were ignored would make runs record a changed checkout."""
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split("\n")[1:]
    known = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    short = {line.removeprefix("**/") for line in ignored if line}
    assert short - {".*_cache", ".venv*"} <= known


@pytest.mark.long
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_real_slurm_begins_a_job_again_until_it_is_done(slurm, tmp_path, tasks):  # noqa: F811
    """The first run waits for SIGTERM and ends with 75, the second with 0."""
    (tmp_path / "launch").symlink_to(LAUNCH)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    job = tmp_path / "job.sh"
    job.write_text(
        f"""echo "begun as $SLURM_PROCID" >>{tmp_path}/runs.$SLURM_PROCID
        if [ "$(wc -l <{tmp_path}/runs.$SLURM_PROCID)" -gt 1 ]; then exit 0; fi
        trap 'echo saved; exit 75' TERM
        touch {tmp_path}/waits.$SLURM_PROCID
        while true; do sleep 0.1; done"""
    )
    submit = ["sbatch", "--parsable", "--gpus-per-node=0", f"--ntasks-per-node={tasks}"]
    done = subprocess.run(
        [*submit, "launch/slurm.sbatch", "bash", job],
        **{"cwd": tmp_path, "env": slurm.env, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    slurm.wait_until(lambda: len(list(tmp_path.glob("waits.*"))) == tasks)
    subprocess.run(
        ["scancel", "--batch", "--signal=TERM", done.stdout.strip()], env=slurm.env, check=True
    )
    slurm.wait_until(lambda: slurm.queue("--states=PENDING"))
    subprocess.run(  # rather than in two minutes
        ["scontrol", "update", f"jobid={done.stdout.strip()}", "starttime=now"],
        **{"env": slurm.env, "check": True},
    )
    slurm.wait_until(lambda: not slurm.queue())
    for process in range(tasks):
        assert (tmp_path / f"runs.{process}").read_text().count("begun") == 2
    log = (tmp_path / f"sa_jax_{done.stdout.strip()}.log").read_text()
    assert log.count("saved") == tasks
