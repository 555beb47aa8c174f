"""Trains a policy: `python train/train.py CONFIG [key=value ...]`, for example

    python train/train.py configs/demo_pretrain.py steps=500 data.num_threads=4

On several hosts the same command is given to each, see `train/launch/`.

This file is the run, in order: mesh, contract, data, state, loop. A run that was stopped at any moment goes on from its
newest complete checkpoint when the same command is given again; what it then computes is what it would have computed.
"""

import functools
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from openpi_like.batch import Batch
from openpi_like.config import load_run, override, to_json
from openpi_like.data.loader import make_loader
from openpi_like.data.order import order_changes
from openpi_like.data.schema import DatasetError
from openpi_like.models.weights import WeightsError, print_load_report
from openpi_like.train.allocation import keep_freed_memory, restart_after_compiling, runs_on_cpus
from openpi_like.train.checkpoints.checkpoint import Checkpointer, find_step
from openpi_like.train.checkpoints.contract import CheckpointError, contract_problems
from openpi_like.train.checkpoints.warm_start import frozen_from, warm_start
from openpi_like.train.compile_cache import use_compile_cache
from openpi_like.train.config import TrainConfig
from openpi_like.train.early_stopping import Patience
from openpi_like.train.fastest import AUTO, attention_of_run, check_attention, decode_choices, encode_choices
from openpi_like.train.hosts.agreement import software
from openpi_like.train.hosts.lock import run_directory
from openpi_like.train.hosts.places import HostsError
from openpi_like.train.hosts.process_group import ProcessGroup, join
from openpi_like.train.image_states import check_image_states
from openpi_like.train.planning.chips import GPU_PART, peak_flops
from openpi_like.train.planning.flops import model_flops
from openpi_like.train.sharding import check_batch, put_batch
from openpi_like.train.validation import Validator
from openpi_like.train.watching.metrics import MetricsWriter, read_metrics
from openpi_like.train.watching.nonfinite import BadSteps
from openpi_like.train.watching.pictures import picture_batch
from openpi_like.train.watching.profiling import DATA_WAIT, DEVICE_WAIT, Profiler
from openpi_like.train.watching.step_log import StepLog, progress_bar, waiting_advice
from openpi_like.train.watching.trackers import TrackerError, check_trackers


def main(config: TrainConfig, group: ProcessGroup, console: Console) -> None:
    # ---- Devices -----------------------------------------------------------------------------------------------------
    group.check_clocks()
    group.check_agree("its config", {k: v for k, v in to_json(config).items() if k != "hosts"})
    group.check_agree("its software", software())
    mesh = config.mesh.create()
    lead = group.lead
    run_dir = Path(config.run_dir)
    if lead:
        console.print(f"{run_dir}: {jax.device_count()} {jax.devices()[0].platform} devices, mesh {dict(mesh.shape)}")

    # ---- Contract: what serving will depend on -----------------------------------------------------------------------
    contract = config.contract()
    problems = contract_problems(contract, drop_cameras=config.data.drop_cameras)
    if problems:
        raise CheckpointError("a policy that cannot be trained and served:\n  " + "\n  ".join(problems))

    # ---- State: resume if this run has a checkpoint, else warm start if asked for, else fresh weights ----------------
    trainer = config.trainer(mesh)
    check_batch(config.batch_size, config.accumulate, mesh)
    checkpointer = Checkpointer(run_dir / "checkpoints", keep=config.keep, trainable=config.trainable)
    group.goes_on_from(lambda: resume_point(run_dir))
    position, order = 0, None
    if checkpointer.latest_step() is not None:
        state, position, order = checkpointer.restore(
            trainer.abstract,
            trainer.shardings,
            contract=contract,
            frozen_from=lambda start: frozen_from(start, trainer),
        )
        console.print(f"resumed at step {int(state.step)}, sample {position}")
    elif config.warm_start is not None:
        weights, plan = warm_start(config.warm_start, trainer, again=not config.save_frozen)
        state = trainer.init_from(weights)
        if lead:
            print_load_report(plan, console)
            (run_dir / "load_report.json").write_text(json.dumps(plan.report, indent=1))
    else:
        state = trainer.init()
    check_image_states(config.data, trainer, state)
    step = int(state.step)
    if checkpointer.latest_step() is None:
        checkpointer.begin(state, source=None if config.save_frozen else config.warm_start)
    trained, frozen = (sum(x.size for x in jax.tree.leaves(of)) for of in (state.params, state.frozen))
    said = f"{trained:,} parameters" + (f" beside {frozen:,} that are not trained" if frozen else "")
    console.print(f"{said}, {config.steps - step:,} of {config.steps:,} steps to go")

    # ---- Data: position in the global sample order is all the state it has -------------------------------------------
    loader = make_loader(
        config.data,
        batch_size=config.batch_size,
        policy=config.model,
        tokenizer=contract.text_tokenizer(),
        normalizations=contract.normalizations,
        action_tokenizer=contract.fast_tokenizer(),
        start=position,
        process_index=group.rank,
        process_count=group.count,
    )
    group.check_agree("the order of its samples (copy the same data and indexes to all hosts)", loader.order)
    if order is None and position:
        console.print("the checkpoint does not say in which order its samples came; going on in the present one")
    changes = [] if order is None else order_changes(order, loader.order)
    if changes and not config.accept_changed_data:
        loader.close()
        raise CheckpointError(
            f"{run_dir} was trained on other data, of which sample {position} is not where this order goes on:\n  "
            + "\n  ".join(changes)
            + "\nrestore the data or its options; or set accept_changed_data to go on in the new order from there"
        )
    for change in changes:
        console.print(f"the order of samples has changed: {change}")
    validator = Validator(config, contract, trainer)

    if lead:  # by now, the run can do what it says
        (run_dir / "config.json").write_text(json.dumps(to_json(config), indent=1))

    patience = Patience(config.patience)
    if config.keep.best and step:
        patience.look_back(config.keep, read_metrics(run_dir / "metrics.jsonl"), until=step)

    # ---- Watching ----------------------------------------------------------------------------------------------------
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    metrics = MetricsWriter(
        run_dir, resume_step=step, active=lead, trackers=config.trackers, config=to_json(config), say=say
    )
    if lead and (step == 0 if config.draw_batch is None else config.draw_batch):
        reader, path = contract.text_tokenizer(), run_dir / "first_batch.png"
        metrics.pictures(step, picture_batch(loader.peek(), trainer, reader, path, say=say))
    sizes = trainer.attention_sizes(config.batch_shapes(config.batch_size))
    if config.attention == AUTO:
        # The lead measures, for all: they have to compile the same program, and the same one again after a resume.
        choices = attention_of_run(run_dir / "attention.json", sizes, mesh) if lead else []
        trainer.attention = decode_choices(group.broadcast("attention", encode_choices(choices)))
        for choice in choices:
            say(str(choice))
    else:
        check_attention(config.attention, sizes, mesh)
    if step < config.steps and not patience.spent:
        started = time.perf_counter()
        train_step = trainer.train_step.lower(state, put_batch(loader.peek(), mesh)).compile()
        took = time.perf_counter() - started
        say(f"compiled in {took:.0f} s")
        # A tracker would show two runs.
        if jax.default_backend() == "cpu" and group.count == 1 and not config.trackers:
            restart_after_compiling(took, config.steps - step, say, closing=(loader, checkpointer, metrics))
    peak = peak_flops(jax.devices())
    if peak is None and jax.default_backend() != "cpu":
        say(f"no MFU: the peak of {jax.devices()[0].device_kind} is not in openpi_like/train/planning/chips.py")
    log = StepLog(
        loader,
        step=step,
        batch_size=config.batch_size,
        schedule=config.optimizer.schedule(),
        model_flops_per_sample=model_flops(trainer.model, config.batch_shapes(1)),
        peak_flops=peak,
    )
    watching: dict[str, Any] = {"paused": log.paused, "say": say}
    profiler = Profiler(config.profile if lead else None, run_dir / "profile", **watching)
    skipped, most = metrics.before["skipped"], config.skip_bad_steps
    bad_steps = BadSteps(trainer, loader.where, run_dir, most=most, count=skipped, **watching)

    def saved() -> dict[str, Any]:
        """Returns what is saved with a state: the position is that of the first batch that is not trained on."""
        return {"position": loader.position, "order": loader.order, "contract": contract, "config": config}

    # ---- Loop --------------------------------------------------------------------------------------------------------
    stopping = group.stopping(step)
    stop, lines = stopping.at(step), 0
    history: list[tuple[int, dict[str, jax.Array], Batch]] = []  # steps whose metrics have not been looked at
    with metrics, progress_bar(console, shown=lead) as progress:
        bar = progress.add_task("train", total=config.steps, completed=step, loss="")
        while step < config.steps and not stop and not patience.spent:
            with profiler.step(step + 1):
                with jax.profiler.TraceAnnotation(DATA_WAIT):
                    batch = next(loader)
                state, values = train_step(state, put_batch(batch, mesh))
                step += 1
                stop = stopping.at(step)
                history.append((step, values, batch))
                logging = step % config.log_every == 0 or step == config.steps
                # Who stops a run waits for its checkpoint, not for a validation, unless it is the last.
                validating = step == config.steps or (step % config.validate_every == 0 and not stop)
                saving = step % config.save_every == 0 or step == config.steps or stop
                # Look at the step before this one: by now it is done, and the device is busy with this one. Before a
                # save, a validation or a log line, look at this one too.
                while len(history) > 1 or (history and (saving or validating or logging)):
                    done, values, seen = history.pop(0)
                    with jax.profiler.TraceAnnotation(DEVICE_WAIT):
                        seen_values = {k: float(v) for k, v in jax.device_get(values).items()}
                    if bad_steps.look(done, seen_values, seen, state):
                        log.add(seen_values)
                    else:
                        metrics.write(done, "skipped", {k: seen_values[k] for k in ("loss", "grad_norm")})
            if logging:
                line = log.line(step, skipped=bad_steps.count)
                metrics.write(step, "train", line)
                progress.update(bar, completed=step, loss=f"loss {line['loss']:.4f} wait {line['data_wait']:.0%}")
                lines += 1
                advice = waiting_advice(line, workers=config.data.num_workers, cores=os.cpu_count() or 1)
                if lines == 2 and advice:  # the first one has the start of the loader in it
                    progress.console.print(advice)
            score = None
            if validating:
                with log.paused():
                    line = validator(state)
                score = config.keep.score(line)
                patience.look(step, score)
                metrics.write(step, "val", line)
                told = ("loss", config.keep.metric) if config.keep.best else ("loss",)
                shown = ", ".join(f"{k} {v:.4f}" for k, v in line.items() if k.startswith(told))
                progress.console.print(f"step {step}: validation {shown}")
            # Save before the next batch is pulled: the position saved is then that of the first batch not trained on.
            if saving or patience.spent:
                checkpointer.save(state, score=score, **saved())
                metrics.sync()
            progress.update(bar, completed=step)
    profiler.close()
    ended = time.perf_counter()
    # Not yet saved: a run of no steps, or a signal that came after this step's turn to save.
    if step not in (checkpointer.last_saved, checkpointer.latest_step()):
        checkpointer.save(state, **saved())
    loader.close()
    checkpointer.close()
    if stop and stopping.signal is not None:
        console.print(
            f"stopped by {stopping.signal.name} at step {step}, saved in {time.perf_counter() - ended:.1f} s; the same "
            "command goes on from here"
        )
        sys.exit(128 + stopping.signal)
    if patience.spent:
        console.print(f"stopped at step {step}: no better {config.keep.metric} in {patience.since} validations")
    if config.keep.best and patience.best is not None:
        console.print(f"best: step {patience.best[0]}, {config.keep.metric} {patience.best[1]:.4g}")
    console.print(f"{step} steps done; checkpoint in {run_dir / 'checkpoints'}")


def resume_point(run_dir: Path) -> str:
    """Returns where a run goes on when it is started again, in words."""
    try:
        return f"step {find_step(run_dir).name}"
    except CheckpointError:
        return "its beginning"


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads
    if runs_on_cpus():
        keep_freed_memory()
    # Before the GPUs are asked for: JAX leaves a quarter of their memory alone otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_PART))
    config, console = override(load_run(sys.argv[1]), sys.argv[2:]), Console()
    use_compile_cache(config.compile_cache)
    try:
        check_trackers(config.trackers)
        with join(config.hosts, console.out) as group, run_directory(config.run_dir, group, console.out):
            main(config, group, Console(quiet=not group.lead))
    except (HostsError, TrackerError, CheckpointError, WeightsError, DatasetError) as e:
        sys.exit(str(e))
