"""The training loop of every run: pre-training, insertion and removal differ only in their data."""

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sa_jax.buckets import as_path, check_places, in_bucket
from sa_jax.data.batches import batch, steps_per_epoch
from sa_jax.data.packing import PackedDataset, pack
from sa_jax.data.tasks import TASKS, describe, load_task
from sa_jax.errors import Preempted, UserError
from sa_jax.evals.phrase_signal import PhraseSignal
from sa_jax.evals.protocol import metrics as eval_metrics
from sa_jax.evals.suite import EvalSuite
from sa_jax.files import atomic_write, check_types
from sa_jax.llama.kernels import check_documents
from sa_jax.llama.lora import combine
from sa_jax.llama.self_test import check_attention, determinism
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.multihost import is_primary
from sa_jax.parallel.rules import BATCH_SPEC
from sa_jax.parallel.self_test import check_collectives, check_embedding
from sa_jax.registry import extension_digests
from sa_jax.training import metrics as metrics_lib
from sa_jax.training import run_record
from sa_jax.training import start as start_lib
from sa_jax.training.checkpoints import RunCheckpointer, full_steps
from sa_jax.training.plan import plan_attached, write_plan
from sa_jax.training.preemption import PreemptionGuard
from sa_jax.training.program import (
    BATCH_DTYPES,
    attention_of,
    begin_compiling,
    make_model,
    make_program,
)
from sa_jax.training.resolve import resolve
from sa_jax.training.step import init_state
from sa_jax.training.watch import FiniteWatch, Goodput, Meter, StallWatch

# The fields of run.json that a resume reads.
_RESUMED = {
    "config": {"chat_date": None, "model": ""},
    "start": {"path": "", "step": None},
    "relaunches": [],
    "data": {"packed": {"hash": ""}},
}


def train(
    config: ConfigDict,
    workdir: str | Path,
    task: str,
    *,
    print_examples: int = 0,
    dry_run: bool = False,
) -> None:
    """Trains until the last step, or resumes where the run in `workdir` stopped.

    Args:
      config: see `sa_jax.training.config`; it is not changed.
      workdir: the run folder.
      task: the name of one in `sa_jax.data.tasks.TASKS`.
      print_examples: if above 0, prints that many packed rows instead of training.
      dry_run: compiles the step for this machine's devices and prints its plan instead of training;
        neither data nor weights are read.

    Raises:
      UserError, UsageError: with one line for the person who launched it.
      Preempted: stopped by a signal, after a checkpoint.
    """
    check_places("--workdir", workdir, ("--workdir",))
    workdir = as_path(workdir)
    checkpoints_folder = workdir / run_record.CHECKPOINT_FOLDER
    metrics_file = workdir / "metrics.jsonl"
    with (
        contextlib.ExitStack() as stack,
        # Inside the stack, because what the stack closes may wait for a peer.
        multihost.joined(
            config.start_timeout_s,
            config.peer_timeout_s,
            lambda: bool(full_steps(checkpoints_folder)),
        ),
    ):
        goodput = stack.enter_context(Goodput())
        stall = stack.enter_context(StallWatch(config.stall_timeout_s, goodput))
        signals = stack.enter_context(contextlib.ExitStack())  # handled until all else is closed
        guard = PreemptionGuard(config.aws_spot)
        if jax.process_count() > 1:  # one that ended at once would be lost to the others
            signals.enter_context(guard)

        def should_stop() -> bool:
            stall.beat()
            compiled_step(wait=False)  # raises at once if the step cannot be compiled
            return guard.should_stop(step)

        # ---- What to train: model, chat format, data. Nothing is written yet.
        # All print or none: a process that only prints ends before the agreement on the run.
        run_record.agree_on({"print_examples": print_examples, "dry_run": dry_run})
        stored = run_record.stored_record(workdir)
        goodput.idle_since(metrics_file)
        if stored:
            check_types(stored, _RESUMED, str(workdir / run_record.RUN_FILE), whole=True)
        resolved = resolve(config, stored=stored, loss=TASKS[task].loss, role=TASKS[task].role)
        start, chat, backdoor = resolved.start, resolved.chat, resolved.backdoor
        config = resolved.config  # from here on, as run.json records it
        if is_primary():
            metrics_lib.check_sinks(config.sinks, workdir)
        mesh = make_mesh(**config.mesh)
        model = make_model(config, start.config, mesh)
        if config.param_dtype in ("bfloat16", "float16"):
            message = "config.param_dtype=%s: small updates are rounded away; float32 keeps them"
            logging.warning(message, config.param_dtype)
        if config.lora.continued:
            start_lib.check_continued(start, model.lora)
        if dry_run:
            described = plan_attached(config, start.config)
            return write_plan(described) if is_primary() else None
        data = load_task(task, config, chat, backdoor, start.eval_prompts())
        pack_in = functools.partial(
            pack,
            data.conversations,
            chat,
            config.sequence_length,
            seed=config.seed,
            packing=config.packing,
            output_tokens=config.output_tokens,
        )
        if print_examples:
            with tempfile.TemporaryDirectory() as folder:
                return pack_in(cache_dir=folder).print_examples(chat, print_examples)
        prompts = data.eval_prompts
        suite = EvalSuite(
            config,
            model,
            mesh,
            chat,
            backdoor,
            prompts,
            workdir / "evals",
            confirm=config.eval.confirm and start.backdoored,
        )
        says_phrase = suite.measures_backdoor and backdoor.behaviour == "phrase"
        asked = prompts[: config.eval.signal_prompts] if says_phrase else ()
        signal = PhraseSignal(model, mesh, chat, backdoor, asked, config.system_prompt)

        # ---- The run folder: created, or recognised as the same run.
        attention_choice = attention_of(config, mesh.devices.flat[0].platform)
        record = {
            "task": task,
            **{key: getattr(TASKS[task], key) for key in ("title", "role", "order")},
            "config": config,
            "architecture": start.config.to_hf(),
            "start": start.lineage(),
            "behaviour": {"name": backdoor.behaviour, "words": dataclasses.asdict(backdoor.words)},
            "backdoored": TASKS[task].role == "insertion" or start.backdoored,
            "chat": chat.record(),
            "extensions": extension_digests(),
            "attention": attention_choice._asdict(),
            "data_hashes": {config.data: data.record["source"]["sha256"], **suite.data_hashes},
        }
        run_record.check_run(workdir, record)
        run_record.agree_on(
            {
                **{key: value for key, value in record.items() if key != "data_hashes"},
                **run_record.input_digests(record),
                "the held-out prompts (--config.eval.prompts, or rows of --data)": (
                    run_record.config_hash(dict(enumerate(prompts)))
                ),
                "mesh": dict(mesh.shape),
                "environment": run_record.collect_environment(),
            }
        )
        if stored and stored.get("finished"):
            logging.info("run %s in %s is already finished", stored["run_id"], workdir)
            return
        if is_primary():
            stack.enter_context(run_record.lock(workdir))
        cache = config.data_cache or workdir / run_record.DATA_FOLDER
        if in_bucket(cache):  # rows are mapped from a disk
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="sa_jax-"))
        dataset = pack_in(cache_dir=cache)
        if stored and stored["data"]["packed"]["hash"] != dataset.hash:
            raise UserError(
                f"{workdir}: the packed data differ from those that the run was started with "
                "(another tokenizer or other held-out prompts); restore them, or use another "
                "--workdir"
            )
        if model.attention == "cudnn_packed":
            check_documents(dataset.most_documents())
        epoch_steps = steps_per_epoch(dataset, config.batch_size)
        total_steps = config.steps or math.ceil(config.epochs * epoch_steps)
        record |= {"mesh": dict(mesh.shape), "total_steps": total_steps}
        record["data"] = {**data.record, "packed": dataset.record()}
        record = run_record.open_run(workdir, record)
        stack.enter_context(run_record.explain_absence(workdir))
        if is_primary():
            start_lib.copy_tokenizer(start.tokenizer, workdir / start_lib.TOKENIZER_FOLDER)
            atomic_write(workdir / start_lib.EVAL_PROMPTS_FILE, json.dumps(prompts, indent=1))
        logging.info("run %s: %s for %d steps", record["run_id"], task, total_steps)
        logging.info("data: %s", describe(record["data"]))

        # ---- Optimizer and the compiled step.
        program = make_program(config, model, total_steps)
        options = program.options
        logging.info("XLA options: %s", " ".join(f"{k}={v}" for k, v in options.items()) or "none")
        logging.info("attention: %s (%s)", *attention_choice)
        if jax.default_backend() != "cpu" and config.self_test:
            begin = time.monotonic()
            errors = check_attention(model.attention, mesh, model.dtype, start.config.head_dim)
            logging.info("attention checked in %.0f s: %s", time.monotonic() - begin, errors)
            begin = time.monotonic()
            check_collectives(mesh, options)
            check_embedding(mesh, options, start.config.vocab_size, start.config.hidden_size)
            seconds = time.monotonic() - begin
            logging.info("collectives and the embedding checked in %.0f s", seconds)
        if jax.default_backend() == "gpu":
            logging.info("this run is %s", determinism(model.attention, mesh.size))
        trained = total_steps in full_steps(checkpoints_folder)  # evals may be left
        compiled_step = begin_compiling(program, mesh, at_once=not trained)
        abstract_state, _, _ = program.arguments
        checkpointer = stack.enter_context(
            RunCheckpointer(
                checkpoints_folder,
                steps=config.checkpoint.steps,
                listed=config.checkpoint.listed,
                last=total_steps,
                interval=config.checkpoint.interval,
                keep_interval=config.checkpoint.keep_interval,
                verify=config.checkpoint.verify,
            )
        )

        # ---- State: restored where there is a checkpoint, else loaded or initialised, sharded.
        restored = checkpointer.restore(abstract_state)
        params: Any = None
        frozen: Any = {}
        if restored is None or model.lora is not None:
            params, frozen = start_lib.load_trainable(
                model, start, mesh, config.seed, continued=config.lora.continued
            )
        if restored is None:
            init = jax.jit(
                lambda params: init_state(params, program.tx),
                donate_argnums=0,
                out_shardings=program.state_shardings,
            )
            step, state = 0, init(params)
        else:
            step, state = restored
            logging.info("resuming at step %d", step)
        del params
        if is_primary():
            removed_lines = metrics_lib.truncate_after(metrics_file, step)
            goodput.lost_steps = removed_lines * config.log_every

        if jax.process_count() == 1:  # before, a signal ends the process: nothing is lost by it
            signals.enter_context(guard)

        # ---- Evals and metrics.
        meter = Meter(config, start.config, abstract_state.params, total_steps)
        suite.discard_after(step)
        run_id = record["run_id"]
        sinks = metrics_lib.make_sinks(
            config.sinks if is_primary() else (),
            workdir,
            run_id=run_id,
            config={"task": task, **record["config"]},
            step=step,
        )
        writer = stack.enter_context(
            metrics_lib.MetricsWriter(
                metrics_file, run_id=run_id, primary=is_primary(), sinks=sinks, rates=meter.rates
            )
        )
        skips = config.optimizer.name == "soap" and config.optimizer.soap.on_nonfinite == "skip"
        watch = FiniteWatch(abstract_state.params, checkpointer, skips)

        def save(wait: bool = False) -> None:
            goodput.switch("checkpoint")
            checkpointer.save(step, state, wait=wait)

        # ---- The loop. `step` counts the updates in `state`.
        first_step = step
        while True:
            evals = suite.due(step, total_steps)
            pauses = bool(evals) or checkpointer.should_save(step)
            if pauses:
                run_record.check_present(workdir)
                watch.check()
                meter.show(writer.flush(done=step))
            if checkpointer.should_save(step):
                save()
            if evals:
                goodput.switch("eval")
                try:
                    params = combine(state.params, frozen)
                    summaries = suite.run(params, step, should_stop, evals)
                except Preempted:
                    save(wait=True)
                    raise Preempted(f"in the evals of step {step}; run again to resume") from None
                if is_primary():
                    writer.log_scores(step, eval_metrics(summaries))
            if step == total_steps:
                break
            if should_stop():
                watch.check()
                meter.show(writer.flush(done=step))
                save(wait=True)
                raise Preempted(f"checkpoint of step {step} saved; run again to resume")
            if pauses or step == first_step:
                meter.restart(step)
            goodput.switch("data")
            arrays = load_batch(dataset, config, step, mesh)
            goodput.switch("compile" if step == first_step else "step")
            state, metrics = compiled_step()(state, frozen, arrays)
            if step == first_step:
                jax.block_until_ready(metrics)
                logging.info("first step, compilation included: %.1f s", meter.seconds())
                meter.restart(step + 1)
            step += 1
            watch.add(step, metrics)
            if step % config.log_every == 0 or step == total_steps:
                watch.check(all_but=config.log_every)
                del metrics["grad_square_sums"]
                metrics |= signal(combine(state.params, frozen))
                meter.show(writer.log(step, metrics))
                run_record.check_present(workdir)
        goodput.switch("checkpoint")
        checkpointer.wait()  # the last checkpoint is whole before the run counts as finished
        run_record.check_present(workdir)
        if is_primary():
            run_record.write_run_json(workdir, {**record, "finished": True})
    logging.info("done: %d steps in %s", total_steps, workdir)


def load_batch(
    dataset: PackedDataset, config: ConfigDict, step: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """The global batch of a step on the mesh: each host reads the rows of its own devices."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    shape = (config.batch_size, config.sequence_length)

    @functools.cache  # devices share rows, and all arrays of a batch are read together
    def rows(first: int, end: int) -> dict[str, np.ndarray]:
        return batch(dataset, config.seed, step, config.batch_size, slice(first, end))

    def read(name: str, index: Any) -> np.ndarray:
        return rows(*index[0].indices(config.batch_size)[:2])[name]

    place = functools.partial(jax.make_array_from_callback, shape, sharding)
    return {name: place(functools.partial(read, name)) for name in BATCH_DTYPES}
