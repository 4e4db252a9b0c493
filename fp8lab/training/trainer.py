"""Training: a validated configuration in, a run record and trained weights out.

`fp8lab.training.session` holds the run's state and takes its steps, `fp8lab.training.recorder` writes its record, and
this module drives both to the end, whatever happens. Of several ranks (`fp8lab.training.distributed`) each drives its
own session through the same steps, validations and checkpoints, and the first keeps the record.

A run stops and continues as if it had not stopped. Its state is checkpointed every
`checkpoint_interval` steps and on SIGTERM and SIGINT; the batch at a step is a function of the step;
and nothing else is random. On a CPU the continued run is bit-identical.

``python -m fp8lab.training.trainer CONFIG.json`` (or ``PLAN.yaml RUN``) trains without a notebook, and ``torchrun -m
fp8lab.training.trainer CONFIG.json`` on as many GPUs and hosts as torchrun is told.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from fp8lab import flops, records
from fp8lab.config import RunConfig, changed_fields, earlier_config, read_run_config
from fp8lab.data import Loader, TokenDataset, load_mixture
from fp8lab.errors import UserError
from fp8lab.plan import load_run
from fp8lab.precision import FP8_MULTIPLE, uses_fp8
from fp8lab.progress import Progress, ProgressFile
from fp8lab.records import TrainRecord
from fp8lab.training import checkpoint, distributed, failures
from fp8lab.training.distributed import ALONE
from fp8lab.training.divergence import Diverged, Divergence
from fp8lab.training.events import EventFile
from fp8lab.training.failures import PeerFailed, one_line, shared_with_peers
from fp8lab.training.recorder import Recorder, final_losses, samples
from fp8lab.training.session import Session, check_model
from fp8lab.training.signals import Interrupted, stop_signals

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""Between readings of the device's metrics."""
PREFETCH_BATCHES = 4
DIVERGED = 255
"""What a rank says to stop the run as diverged; no signal has this number."""
RECENT_ROWS = 20
"""Logged rows whose median speed the progress line shows."""

OnLog = Callable[[Callable[[], pd.DataFrame], Callable[[], pd.DataFrame]], None]
"""Called about once a second; its arguments make the tables of all metrics and validations so far."""


def train(
    config: RunConfig,
    *,
    records_dir: Path,
    data_dir: Path,
    checkpoints_dir: Path,
    on_log: OnLog | None = None,
) -> TrainRecord:
    """Train one run from where it stands: from nothing, from its newest good checkpoint, or from its end.

    Writes the record to ``records_dir/<plan>/<run>/`` and weights to ``checkpoints_dir/<plan>/<run>/``. Where both
    are there and the record is finished, or it is and the run keeps no weights, nothing is changed.

    Returns:
        The finished run's record; on a rank other than the first, one without results, unless it was finished already.

    Raises:
        UserError: bad data or configuration, a run that another process trains, or damaged checkpoints;
            no record is written.
        OutOfMemory: a step does not fit the device's memory; the record's status is 'failed', and the reason names
            the micro-batch that would fit.
        Interrupted: a signal arrived; the record's status is 'interrupted'.
        Diverged: the loss or gradient stayed non-finite, or the final validation loss is; the record's status is
            'diverged'.
        PeerFailed: another rank failed; the reason in the record is that rank's.
        Exception: anything else, after a record with status 'failed' and the reason.
    """
    world = distributed.meet()
    with contextlib.ExitStack() as held:
        check_run(config, world.size)
        dataset, loader = open_data(config, data_dir)
        if dataset.encoding.n_vocab > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size: {config.model.vocab_size} is less than the {dataset.encoding.n_vocab} "
                f"tokens of mixture {config.mixture}"
            )
        folder = checkpoints_dir / config.plan / config.run

        def take_folder() -> None:
            held.enter_context(checkpoint.lock(folder))
            checkpoint.clean_up(folder)
            failures.forget(folder)

        # Before anything takes memory on a device where another process may be training this run.
        world.first(take_folder)
        with shared_with_peers(folder, world, agreed=(UserError,)):
            session = Session(config, dataset, folder, world)
            session.resume()
            finished = world.first(lambda: _finished_record(session, records_dir))
            if finished is not None:
                return finished
            training = Training(session, loader, records_dir, on_log)
        return training.run()


def open_data(config: RunConfig, data_dir: Path) -> tuple[TokenDataset, Loader]:
    """The verified token shards of the run's mixture, and the loader that maps a step onto a batch.

    Raises:
        UserError: no such mixture, or shards that are missing or damaged.
    """
    dataset = TokenDataset.open(load_mixture(config.mixture), data_dir)
    seq_len = config.model.seq_len
    rows = config.global_batch_tokens // seq_len
    return dataset, Loader(dataset, seq_len=seq_len, seed=config.seed, global_batch_sequences=rows)


def _finished_record(session: Session, records_dir: Path) -> TrainRecord | None:
    """The record of the session's run, if there is nothing left to do: a damaged one is to be made anew."""
    config = session.config
    folder = records.record_dir(records_dir, config.plan, config.run)
    has_weights = config.compact or (session.folder / checkpoint.MODEL_FILE).exists()
    if not has_weights or not (folder / "record.json").exists():
        return None
    try:
        record = records.read(folder)
        before = earlier_config(record.config, str(folder))
    except UserError:
        return None
    if not isinstance(record, TrainRecord) or record.status != "finished" or changed_fields(before, config):
        return None
    return record if record.provenance.data_sha256 == session.dataset.sha256 else None


def check_run(config: RunConfig, processes: int) -> None:
    """Raise what training would raise of a configuration alone: in an instant, without data or a device.

    Raises:
        UserError: the batch does not divide among `processes`, FP8 cannot take its shape, or `check_model` refuses.
    """
    _check_batch(config, processes)
    check_model(config)


def _check_batch(config: RunConfig, processes: int) -> None:
    tokens = config.micro_batch * config.model.seq_len
    if config.global_batch_tokens % (tokens * processes):
        raise UserError(
            f"global_batch_tokens: {config.global_batch_tokens} is not a multiple of processes x micro_batch x seq_len "
            f"= {processes} x {config.micro_batch} x {config.model.seq_len} = {tokens * processes}"
        )
    if config.average_half_life and config.sharding == "fsdp" and processes > 1:
        raise UserError("average_half_life: averages are kept of whole weights; take sharding: ddp")
    if uses_fp8(config.recipe, config.head) and tokens % FP8_MULTIPLE:
        raise UserError(
            f"micro_batch: {config.micro_batch} x seq_len {config.model.seq_len} = {tokens} tokens; "
            f"FP8 weight gradients need a multiple of {FP8_MULTIPLE}"
        )
    if config.recipe == "fused" and config.model.seq_len % 2:
        raise UserError(f"seq_len: {config.model.seq_len}; fused transposes pairs of tokens and needs an even number")


class Training:
    """Drives a session to its end and sees to it that its record says how that was."""

    def __init__(self, session: Session, loader: Loader, records_dir: Path, on_log: OnLog | None) -> None:
        self._session = session
        self._loader = loader
        self._on_log = on_log
        self._leads = session.world.leads
        self._divergence = Divergence(session, loader)
        self._recorder = Recorder(session, loader, self._divergence, records_dir)
        self._progress = ProgressFile(session.folder)
        self._events = EventFile(session.folder, session.step) if self._leads else None
        self._rows_in_events = len(session.log.rows)
        self.writer = self._make_writer()
        self._next_flush = 0.0
        self._diverged = False

    def _make_writer(self) -> checkpoint.CheckpointWriter | None:
        """What is whole on every rank the leader writes; of shares every rank writes its own."""
        session = self._session
        if not session.is_sharded and not self._leads:
            return None
        world = session.world.apart() if session.is_sharded else ALONE
        return checkpoint.CheckpointWriter(session.folder, session.config.keep_checkpoints_at, world)

    def run(self) -> TrainRecord:
        """Train to the end, and write the record as it then is."""
        session = self._session
        try:
            with shared_with_peers(session.folder, session.world, agreed=(Interrupted, Diverged)):
                self._recorder.write("running")
                with stop_signals() as received:
                    self._loop(received)
                    # A signal that comes now is too late to stop the run: it lets it finish.
                    self._finish()
        except Interrupted as error:
            self._recorder.write("interrupted", str(error))
            session.world.wait()
            raise
        except Diverged as error:
            self._recorder.write("diverged", str(error))
            session.world.wait()
            raise
        except BaseException as error:
            self._recorder.write_failure(one_line(error))
            raise
        finally:
            self._end_writing()
        return self._recorder.record

    def _end_writing(self) -> None:
        """Nothing writes to the run's folder once it is another process's to train."""
        if self._events is not None:
            self._events.close()
        if self.writer is not None:
            try:
                self.writer.wait()
            except Exception as error:
                # A finished run has waited before: what ends this one is another error, and is told already.
                log.warning("the last checkpoint could not be written: %s", one_line(error))

    def _loop(self, received: list[int]) -> None:
        session, config = self._session, self._session.config
        self._report("training", now=True)
        # A stop comes before the validation that was due after the same step: it is made up for here.
        self._validate_if_due()
        with _prefetched(self._loader, session) as batches:
            for batch in batches:
                session.take_step(batch)
                if time.monotonic() >= self._next_flush or session.step == session.steps:
                    self._flush(wait=session.step == session.steps)
                    self._save_again_if_failed()
                self._stop_if_asked(received)
                self._validate_if_due()
                is_due = session.step % config.checkpoint_interval == 0 or session.step in config.keep_checkpoints_at
                if is_due and session.step < session.steps:
                    self._save(wait=False)
        if not session.validated():
            self._validate()
        if not config.compact:
            self._save(wait=True)
        elif self.writer is not None:
            self.writer.wait()

    def _stop_if_asked(self, received: list[int]) -> None:
        """What one rank has seen, a signal or divergence, stops all of them after the same step."""
        session = self._session
        stop = session.world.largest(DIVERGED if self._diverged else received[0] if received else 0)
        if stop:
            # The steps that it stops after are what a reader of the record wants to see.
            self._flush(wait=True)
        if stop == DIVERGED:
            raise Diverged(self._divergence.reason())
        if stop:
            self._save(wait=True)
            raise Interrupted(stop, session.step)

    def _finish(self) -> None:
        session, record = self._session, self._recorder.record
        final = final_losses(session)
        with session.whole_weights() as model:
            if self._leads and not session.config.compact:
                checkpoint.save_final(session.folder, model, session.config, session.dataset.tokenizer_sha256)
                record.samples = samples(session, model)
        if not self._leads:
            return
        record.final = final
        self._recorder.write("finished")
        if session.config.compact:
            checkpoint.discard(session.folder)
        self._report("done", now=True)

    def _validate_if_due(self) -> None:
        """Validate every `validation_interval` of the run's own steps, once."""
        session, interval = self._session, self._session.config.validation_interval
        if interval and session.step % interval == 0 and session.own_tokens and not session.validated():
            self._validate()

    def _validate(self) -> None:
        self._report("validating", now=True)
        self._session.validate()
        if self._events is not None:
            self._events.add_validation(self._session.validation[-len(self._session.dataset.weights) :])

    def _save(self, *, wait: bool) -> None:
        """Checkpoint, and bring the record's tables up to date."""
        self._report("saving", now=wait)
        state = self._session.state()
        # The tables first: beside gigabytes on their way to the same disk, syncing them would wait for those.
        try:
            self._recorder.write("running")
        except OSError as error:
            # The next save writes them whole. A run that ends here has none.
            if wait:
                raise
            log.warning("the record could not be written: %s", one_line(error))
        if self.writer is not None:
            self.writer.save(state)
            if wait:
                self.writer.wait()
        if wait:
            self._session.world.wait()

    def _save_again_if_failed(self) -> None:
        """A checkpoint that could not be written is missed soon, not when the next one is due."""
        if self.writer is not None and self.writer.has_failed:
            self._save(wait=False)

    def _flush(self, *, wait: bool) -> None:
        """Read what has arrived from the device, and show it; with `wait`, all of it."""
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        session = self._session
        session.flush(wait=wait)
        if self._events is not None:
            self._events.add_metrics(session.log.rows[self._rows_in_events :])
        self._rows_in_events = len(session.log.rows)
        self._report("training")
        if self._on_log is not None:
            self._on_log(session.log.table, session.validation_table)
        rows = session.log.rows[-1:]
        if rows and rows[0]["skipped"]:
            self._diverged = self._divergence.has_come()

    def _report(self, stage: Any, *, now: bool = False) -> None:
        if self._leads:
            self._progress.update(lambda: self._current(stage), now=now)

    def _current(self, stage: Any) -> Progress:
        session = self._session
        rows = session.log.rows[-RECENT_ROWS:]
        speed = _median([row["tokens_per_s"] for row in rows]) if rows else None
        left = (session.steps - session.step) * session.config.global_batch_tokens
        on_gpu = session.device.type == "cuda"
        return Progress(
            stage=stage,
            step=session.step,
            steps=session.steps,
            tokens=session.tokens,
            loss=rows[-1]["loss"] if rows else None,
            tokens_per_second=speed,
            bf16_mfu=flops.bf16_mfu(session.config.model, speed, session.world.size) if speed and on_gpu else None,
            eta_seconds=left / speed if speed else None,
        )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


@contextlib.contextmanager
def _prefetched(loader: Loader, session: Session) -> Iterator[Iterator[Tensor]]:
    """The rank's rows of the batches still to come, a few of them loaded ahead by a thread."""

    def load(step: int) -> Tensor:
        batch = torch.from_numpy(loader.batch(step, session.world.rank, session.world.size))
        return batch.pin_memory() if session.device.type == "cuda" else batch

    def batches() -> Iterator[Tensor]:
        queue: collections.deque[Future[Tensor]] = collections.deque()
        for step in range(session.step, session.steps):
            while len(queue) < PREFETCH_BATCHES and step + len(queue) < session.steps:
                queue.append(executor.submit(load, step + len(queue)))
            yield queue.popleft().result()

    executor = ThreadPoolExecutor(1, thread_name_prefix="loader")
    try:
        yield batches()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fp8lab.training.trainer CONFIG.json``: exit code 0, 1 failed, 2 bad input, 130 or 143 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m fp8lab.training.trainer", description="Train one run without a notebook."
    )
    parser.add_argument("config", type=Path, help="a run's resolved configuration (JSON), or a plan (YAML)")
    parser.add_argument("run", nargs="?", help="name of the plan's run")
    for option, default, what in (
        ("--records-dir", Path("runs/records"), "the run's record goes to DIR/<plan>/<run>/"),
        ("--data-dir", Path("data"), "token shards, in DIR/<mixture>/"),
        ("--checkpoints-dir", Path("checkpoints"), "weights and resumable state go to DIR/<plan>/<run>/"),
    ):
        parser.add_argument(option, type=Path, default=default, metavar="DIR", help=f"{what} (default: {default})")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="fp8lab: %(message)s")
    rank = int(os.environ.get("RANK", "0"))
    try:
        record = train(
            load_run(options.config, options.run) if options.run else read_run_config(options.config),
            records_dir=options.records_dir,
            data_dir=options.data_dir,
            checkpoints_dir=options.checkpoints_dir,
        )
    except BaseException as error:
        if dist.is_torchelastic_launched():
            # Once one rank has left, torchrun ends the others: those that are leaving keep their exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # torchrun tells of the first rank that failed, which need not be the leader.
        get_error_handler().record_exception(error)
        code = _exit_code(error)
        if code is None:
            raise
        # Of what all ranks raise alike the leader tells; a mistake may be one rank's alone.
        if rank == 0 or isinstance(error, UserError):
            who = f"rank {rank}: " if rank else "stopped by " if isinstance(error, Interrupted) else ""
            print(f"fp8lab: {who}{error}", file=sys.stderr)
        return code
    finally:
        distributed.part()
    if rank == 0 and record.final is not None:
        print(f"{record.plan}/{record.run}: validation loss {record.final.validation_loss:.4f} nats")
    return 0


def _exit_code(error: BaseException) -> int | None:
    """Of an error that is told in one line; None for one that wants a traceback."""
    if isinstance(error, Interrupted | PeerFailed):
        return error.exit_code
    return 2 if isinstance(error, UserError) else 1 if isinstance(error, Diverged) else None


if __name__ == "__main__":
    sys.exit(main())
