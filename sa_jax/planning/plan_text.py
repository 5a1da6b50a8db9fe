"""A plan as a table of text; the same numbers are written as JSON."""

from typing import Any

from tqdm import tqdm

from sa_jax.errors import install
from sa_jax.planning import clock, roofline

_ROWS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "frozen": "frozen weights",
    "batch": "batch",
    "arguments": "= arguments",
    "temporaries": "temporaries",
    "gradients": "  gradients in them",
    "activations": "  kept activations in them",
    "workspace": "cuDNN's workspace",
    "needed": "needed at the peak",
}


def format_plan(plan: dict[str, Any]) -> str:
    """The plan of `training.plan.make_plan` on one screen."""
    memory, model = plan["memory_gib_per_chip"], plan["model"]
    settings = [
        f"{key} {value}" for key, value in plan["settings"].items() if value not in ("", None)
    ]
    seconds = f" in {plan['compile_s']:.0f} s" if plan["compile_s"] else ""
    lines = [
        f"machine      {plan['machine']['described']}",
        f"model        {model['parameters']:,} parameters, {model['trainable']:,} of them train",
        f"step         {', '.join(settings)}",
        "",
        f"memory per chip, GiB ({memory['source']}{seconds})",
    ]
    for key, label in _ROWS.items():
        if memory[key] or key == "temporaries":
            estimated = " (estimated)" if key in ("gradients", "activations", "workspace") else ""
            lines.append(f"  {label:26}{memory[key]:10.2f}{estimated}")
    if memory["source"] == "estimated" and plan["machine"]["chips"]:
        lines.append(f"  to compile it instead: {install('plan-gpu')}")
    if memory["host"]:
        lines.append(f"  {'in the host memory':26}{memory['host']:10.2f}")
    if plan["capacity_gib"]:
        verdict = f"fits, {plan['free_gib']:.1f} free" if plan["fits"] else "DOES NOT FIT"
        lines.append(f"  {'available':26}{plan['capacity_gib']:10.2f}   {verdict}")
    if plan["advice"]:
        lines.append(f"  {plan['advice']}")
    lines += ["", _disk_line(plan["disk"])]
    lines += ["", f"FLOPs per token (causal, no recomputation) {plan['flops_per_token']:.4g}"]
    lines += _time_lines(plan["time"], plan["run"]) + _clock_lines(plan["clock"])
    traffic = plan["collectives"]
    lines += ["", f"collectives of a step ({traffic['source']})"]
    for kind, sent in traffic["kinds"].items():
        gib = sent["bytes"] / 2**30
        lines.append(f"  {kind:36}{sent['count']:8,} times{gib:10.2f} GiB per device")
    lines += _soap_lines(plan["soap"])
    for title, values in (("tried", plan["tried"]), ("XLA flags", plan["xla_flags"])):
        if values:
            lines += ["", title] + [f"  {value}" for value in values]
    return "\n".join(lines)


def _speed(title: str, time: dict[str, Any]) -> str:
    rate, mfu = time["tokens_per_s_per_chip"], time["mfu"]
    return f"tokens/s/chip, {title}: {rate:,.0f} (MFU {100 * mfu:.0f} %)"


def _time_lines(time: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """The roofline's lines; none if the chip is not known."""
    if not time:
        return []
    parts = {"compute": "compute_s", "HBM": "hbm_s", "interconnect": "interconnect_s"}
    if time["between_slices_s"]:
        parts["between slices"] = "between_slices_s"
    shown = ", ".join(f"{name} {time[key]:.3f}" for name, key in parts.items())
    return [
        f"time per step, at least: {time['step_s']:.3f} s, limited by {time['bound']} ({shown})",
        _speed("at most", time),
        f"run of {run['tokens'] / 1e6:,.1f}M token slots ({run['steps']:,} steps): at least "
        f"{run['hours']:.2f} hours, {run['chip_hours']:.1f} chip-hours",
        *_assumed(roofline.ASSUMPTIONS),
    ]


def _assumed(assumptions: tuple[str, ...]) -> list[str]:
    return ["assumed:"] + [f"  - {text}" for text in assumptions]


def _clock_lines(read: dict[str, Any]) -> list[str]:
    """The lines of the compiler's clock; none if no TPU executable was read."""
    if not read:
        return []
    kinds = ("products", "attention", "fusions", "copies", "collectives")
    shown = ", ".join(f"{kind} {read[kind]:.3f}" for kind in kinds)
    lines = [
        "",
        f"time per step, by the compiler's clock: {read['step_s']:.3f} s ({shown})",
        _speed("by the compiler's clock", read),
    ]
    if read["conditionals"]:
        lines.append(
            f"its dearest step: {read['dearest_step_s']:.3f} s (conditionals: "
            f"{read['conditionals']}; above, each takes its cheapest branch)"
        )
    return lines + _assumed(clock.ASSUMPTIONS)


def _disk_line(disk: dict[str, float]) -> str:
    keys = ("total", "full_state", "weights")
    total, full_state, weights = (tqdm.format_sizeof(disk[key], "B") for key in keys)
    kept = f"full states: {disk['full_states']} x {full_state}"
    if disk["weights_alone"]:
        kept += f", only weights: {disk['weights_alone']} x {weights}"
    return f"disk: {total} of checkpoints at the end ({kept}); during a save, one more full state"


def _soap_lines(rows: list[dict[str, Any]]) -> list[str]:
    """SOAP's table, its sums last; no lines for another optimizer."""
    if not rows:
        return []

    def side(basis: dict[str, int] | None) -> str:
        if basis is None:
            return "-"
        return f"{basis['blocks']} x {basis['block']}" if basis["blocks"] else "no basis"

    def line(path: str, matrices: str, rows: str, cols: str, row: dict[str, Any]) -> str:
        numbers = "".join(f"{row[key] / unit:9.2f}" for key, unit in units.items())
        return f"  {path:28}{matrices:>9}{rows:>11}{cols:>11}{numbers}"

    units = {"moment_bytes": 1e9, "basis_bytes": 1e9, "step_flops": 1e12, "refresh_flops": 1e12}
    sums = {key: sum(row[key] for row in rows) for key in units}
    lines = [
        line(row["path"], str(row["matrices"] or "-"), side(row["rows"]), side(row["cols"]), row)
        for row in rows
    ]
    return [
        "",
        "SOAP by parameter, over all devices: GB of averages, and of factors and bases; TFLOPs",
        f"  {'':28} matrices       rows    columns  moments    bases     step  refresh",
        *lines,
        line("sum", "", "", "", sums),
    ]
