"""Training: a validated configuration in, a run record and trained weights out.

One optimizer step: for each micro-batch, forward under BF16 autocast and backward into FP32
gradients; their global norm; the guard's verdict; then fused AdamW on the FP32 master weights, which
clips and skips on the device. The host only queues work: it reads losses later, in bunches.

A run stops and continues as if it had not stopped. Its state is checkpointed every
`checkpoint_interval` steps and on SIGTERM and SIGINT; the batch at a step is a function of the step;
and nothing else is random. On a CPU the continued run is bit-identical.

``python -m fp8lab.trainer CONFIG.json`` trains without a notebook.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import logging
import math
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from fp8lab import checkpoint, flops, records
from fp8lab.config import MAY_CHANGE, RunConfig, read_run_config, validate
from fp8lab.data import Loader, TokenDataset, load_mixture
from fp8lab.errors import UserError
from fp8lab.events import EventFile
from fp8lab.generation import generate
from fp8lab.guard import StepGuard
from fp8lab.kernels import end_step
from fp8lab.loss import total_nats, training_loss
from fp8lab.metrics import MetricsLog, Stopwatch, spike_score
from fp8lab.model import GPT
from fp8lab.precision import FP8_MULTIPLE, convert, fp8_tensor_cores, uses_fp8
from fp8lab.progress import Progress, ProgressFile
from fp8lab.records import DomainLoss, FinalLosses, Speed, Stability, TrainRecord
from fp8lab.schedule import decay_start, learning_rate_fraction, warmup_steps

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""Between readings of the device's metrics."""
PREFETCH_BATCHES = 4
DIVERGED_AFTER = 20
"""Skipped steps in a row after which a run has diverged."""
FINAL_LOSS_ROWS = 20
"""Logged rows that the final training loss is the mean of."""
WARMUP_ROWS = 5
"""Rows after a (re)start that the median step time leaves out: compilation and first touches."""
VALIDATION_TYPES = {"step": "int64", "tokens": "int64", "domain": "str", "loss": "float64", "bits_per_byte": "float64"}
SAMPLE_PROMPT_TOKENS = 16
SAMPLE_TOKENS = 48
BRANCH_MAY_CHANGE = MAY_CHANGE | {"run", "parent", "tokens", "schedule", "validation_interval", "log_interval"}
"""Fields in which a decay branch may differ from its parent."""

OnLog = Callable[[Callable[[], pd.DataFrame], Callable[[], pd.DataFrame]], None]
"""Called about once a second; its arguments make the tables of all metrics and validations so far."""


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the run is checkpointed and its record says so."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} after step {step}; the same command resumes")
        self.exit_code = 128 + signal_number


class Diverged(Exception):
    """Every one of the last steps was skipped."""


def train(
    config: RunConfig,
    *,
    records_dir: Path,
    data_dir: Path,
    checkpoints_dir: Path,
    on_log: OnLog | None = None,
) -> TrainRecord:
    """Train one run from where it stands: from nothing, from its newest good checkpoint, or from its end.

    Writes the record to ``records_dir/<plan>/<run>/`` and weights to ``checkpoints_dir/<plan>/<run>/``.

    Returns:
        The finished run's record.

    Raises:
        UserError: bad data or configuration, a run that another process trains, or damaged checkpoints;
            no record is written.
        Interrupted: a signal arrived; the record's status is 'interrupted'.
        Diverged: the loss or gradient stayed non-finite; the record's status is 'diverged'.
        Exception: anything else, after a record with status 'failed' and the reason.
    """
    _check_batch(config)
    dataset, loader = open_data(config, data_dir)
    if dataset.encoding.n_vocab > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is less than the {dataset.encoding.n_vocab} "
            f"tokens of mixture {config.mixture}"
        )
    folder = checkpoints_dir / config.plan / config.run
    session = _Session(config, dataset, folder)
    with checkpoint.lock(folder):
        checkpoint.clean_up(folder)
        session.resume()
        return _Recorder(session, loader, records_dir, on_log).run()


def open_data(config: RunConfig, data_dir: Path) -> tuple[TokenDataset, Loader]:
    """The verified token shards of the run's mixture, and the loader that maps a step onto a batch.

    Raises:
        UserError: no such mixture, or shards that are missing or damaged.
    """
    dataset = TokenDataset.open(load_mixture(config.mixture), data_dir)
    seq_len = config.model.seq_len
    rows = config.global_batch_tokens // seq_len
    return dataset, Loader(dataset, seq_len=seq_len, seed=config.seed, global_batch_sequences=rows)


def _check_batch(config: RunConfig) -> None:
    tokens = config.micro_batch * config.model.seq_len
    if uses_fp8(config.recipe, config.head) and tokens % FP8_MULTIPLE:
        raise UserError(
            f"micro_batch: {config.micro_batch} x seq_len {config.model.seq_len} = {tokens} tokens; "
            f"FP8 weight gradients need a multiple of {FP8_MULTIPLE}"
        )


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next step instead of returning it to the kernel.

    Faulting it in again at every step costs a CPU run up to a fifth of its speed. Does nothing without glibc.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)


def device_name(device: torch.device) -> str:
    """What records call `device`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else records.cpu_name()


def compile_blocks(model: GPT, device: torch.device) -> None:
    """torch.compile each block and the final norm: blocks share a graph, so it takes seconds, not minutes."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if device.type == "cpu" and not (compiler and Path(sysconfig.get_path("include"), "Python.h").exists()):
        log.warning("no C++ compiler (g++ or clang++) or no Python headers: the run is not compiled")
        return
    for block in model.blocks:
        block.compile(dynamic=False)
    model.norm.compile(dynamic=False)


def make_optimizer(model: GPT, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over all parameters, weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    settings = config.optimizer
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.peak_learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


@torch.no_grad()
def first_non_finite_output(model: GPT, tokens: Tensor) -> str | None:
    """Name of the first module, in forward order, whose output on `tokens` (batch, seq) is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        # Hooks inside a compiled block are not called.
        with torch.compiler.set_stance("force_eager"), torch.autocast(tokens.device.type, torch.bfloat16):
            model(tokens)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else None


class _Session:
    """The state of one run on one device, and the step that advances it."""

    def __init__(self, config: RunConfig, dataset: TokenDataset, folder: Path) -> None:
        self.config = config
        self.dataset = dataset
        self.folder = folder
        self.device = training_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.emulated = uses_fp8(config.recipe, config.head) and not fp8_tensor_cores()
        self.model = GPT(config.model)
        self.model.initialise(config.seed)
        self.model.to(self.device)
        # The weights' BF16 view of themselves: validation measures weights, whatever the recipe computes in.
        self.bf16_model = _share_weights(self.model)
        self.conversion = convert(self.model, config.recipe, config.head, config.high_precision)
        self.model.train()
        self.model.checkpoint_activations = config.activation_checkpointing
        self.optimizer = make_optimizer(self.model, config, self.device)
        self.guard = StepGuard(len(list(self.model.parameters())), config.optimizer.skip_outliers).to(self.device)
        self.log = MetricsLog(self.device, config.global_batch_tokens)
        self.validation: list[dict[str, Any]] = []
        self.step = 0
        self.resumed_at = 0
        self.earlier_seconds = 0.0
        self.started_utc: str | None = None
        self.began = time.perf_counter()
        if config.compile:
            # Graphs of earlier runs in this process would count against the limit of recompilations.
            torch.compiler.reset()
            compile_blocks(self.model, self.device)

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def tokens(self) -> int:
        return self.step * self.config.global_batch_tokens

    @property
    def own_tokens(self) -> int:
        """Tokens trained on by this run itself, those of a branch's parent left out."""
        parent = self.config.parent
        return self.tokens - (parent.step * self.config.global_batch_tokens if parent else 0)

    @property
    def wall_seconds(self) -> float:
        """Time spent on the run, interruptions excluded."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def take_step(self, batch: Tensor) -> None:
        """One optimizer step on `batch` (rows, seq_len + 1), logged; nothing here waits for the device."""
        config, optimizer = self.config, self.optimizer
        stopwatch = Stopwatch(self.device).start()
        lr = config.optimizer.peak_learning_rate * learning_rate_fraction(config.schedule, self.step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = batch.to(self.device, non_blocking=True)
        try:
            loss = self._accumulate_gradients(batch, config.micro_batch)
        except torch.OutOfMemoryError:
            raise UserError(self._advise_micro_batch(batch)) from None
        parameters = list(self.model.parameters())
        norms = torch.stack(torch._foreach_norm([cast(Tensor, parameter.grad) for parameter in parameters]))
        norm, skip = self.guard.judge(self.step, loss, norms)
        # Fused AdamW divides gradients by grad_scale and leaves everything as it was where found_inf is 1:
        # clipping and skipping cost no pass over memory of their own.
        optimizer.grad_scale = (norm / config.optimizer.gradient_clip).clamp(min=1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end_step(self.model)
        stopwatch.stop()
        self.step += 1
        if self.step % config.log_interval == 0 or self.step == self.steps:
            self.log.add(self.step, lr, torch.stack((loss, norm, skip.float())), stopwatch)

    def _accumulate_gradients(self, batch: Tensor, micro_batch: int) -> Tensor:
        """Gradients of the mean loss over `batch`, `micro_batch` sequences at a time; returns that loss."""
        micro_batches = batch.split(micro_batch)
        total = torch.zeros((), device=self.device)
        for tokens in micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16):
                hidden = self.model.hidden(tokens[:, :-1])
                objective, loss = training_loss(self.model, hidden, tokens[:, 1:], self.config.optimizer.z_loss)
            (objective / len(micro_batches)).backward()
            total += loss / len(micro_batches)
        return total

    def _advise_micro_batch(self, batch: Tensor) -> str:
        """Which micro-batch fits the device's memory, found by trying."""
        problem = (
            f"micro_batch: {self.config.micro_batch} sequences do not fit the memory of {device_name(self.device)}"
        )
        # Before the first step the optimizer has yet to take its share.
        moments = [] if self.optimizer.state else [torch.zeros_like(p) for p in self.model.parameters() for _ in "mv"]
        for micro_batch in range(self.config.micro_batch // 2, 0, -1):
            if self.config.micro_batch % micro_batch:
                continue
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            with contextlib.suppress(torch.OutOfMemoryError):
                self._accumulate_gradients(batch[:micro_batch], micro_batch)
                del moments
                return f"{problem}; {micro_batch} do"
        return f"{problem}; not even 1 does: take a smaller model or seq_len, or activation_checkpointing"

    @torch.no_grad()
    def validate(self) -> None:
        """Loss and bits per byte of each domain's validation text, into `validation`."""
        for domain in self.dataset.weights:
            windows, text_bytes = self.dataset.validation_windows(
                domain, self.config.model.seq_len, self.config.validation_tokens
            )
            nats = torch.zeros((), dtype=torch.float64, device=self.device)
            for rows in torch.from_numpy(windows).split(self.config.micro_batch):
                rows = rows.to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16):
                    nats += total_nats(self.bf16_model, self.bf16_model.hidden(rows[:, :-1]), rows[:, 1:])
            predicted = windows.shape[0] * self.config.model.seq_len
            self.validation.append(
                {
                    "step": self.step,
                    "tokens": self.tokens,
                    "domain": domain,
                    "loss": float(nats) / predicted,
                    "bits_per_byte": float(nats) / math.log(2) / text_bytes,
                }
            )

    def validated(self) -> bool:
        """True if the weights as they stand have been validated."""
        return bool(self.validation) and self.validation[-1]["step"] == self.step

    def state(self) -> checkpoint.TrainingState:
        """Everything to continue from; waits for the device."""
        self.log.flush(wait=True)
        optimizer = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return checkpoint.TrainingState(
            step=self.step,
            model=self.model.state_dict(),
            optimizer=optimizer,
            trainer=self.guard.state_dict(),
            metrics=self.log.table(),
            validation=self.validation_table(),
            facts={
                "config": self.config.model_dump(mode="json"),
                "data_sha256": self.dataset.sha256,
                "mixture_weights": self.dataset.weights,
                "wall_seconds": self.wall_seconds,
                "started_utc": self.started_utc,
            },
        )

    def validation_table(self) -> pd.DataFrame:
        """All validations so far."""
        return pd.DataFrame(self.validation, columns=list(VALIDATION_TYPES)).astype(VALIDATION_TYPES)

    def resume(self) -> None:
        """Continue from the folder's newest good checkpoint, if it has one.

        Raises:
            UserError: all are damaged, or they were made with another configuration or other data.
        """
        state = checkpoint.load_latest(self.folder)
        parent = self.config.parent
        if state is not None:
            self._check_compatible(state, self.folder, MAY_CHANGE)
            self._restore_tensors(state)
            self._restore_history(state)
        elif parent is not None:
            folder = self.folder.parent / parent.run
            state = checkpoint.load_step(folder, parent.step)
            self._check_compatible(state, folder, BRANCH_MAY_CHANGE)
            self._check_stable_part(state, folder)
            self._restore_tensors(state)
            self.step = self.resumed_at = state.step

    def _restore_tensors(self, state: checkpoint.TrainingState) -> None:
        self.model.load_state_dict(state.model)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state[parameter] = {
                key: state.optimizer[f"{name}.{key}"].to(self.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.guard.load_state_dict(state.trainer)

    def _restore_history(self, state: checkpoint.TrainingState) -> None:
        rows = cast(list[dict[str, Any]], state.metrics.to_dict("records"))
        self.log = MetricsLog(self.device, self.config.global_batch_tokens, rows)
        self.validation = cast(list[dict[str, Any]], state.validation.to_dict("records"))
        self.step = self.resumed_at = state.step
        self.earlier_seconds = state.facts["wall_seconds"]
        self.started_utc = state.facts["started_utc"]

    def _check_compatible(self, state: checkpoint.TrainingState, folder: Path, may_change: set[str]) -> None:
        config = self.config.model_dump(mode="json")
        before = state.facts["config"]
        changed = [key for key in config if key not in may_change and before.get(key) != config[key]]
        if state.facts["data_sha256"] != self.dataset.sha256:
            changed.append("the mixture's data")
        if state.facts.get("mixture_weights", self.dataset.weights) != self.dataset.weights:
            # Weights decide the order of the data and are no part of its hash.
            changed.append("the mixture's weights")
        if changed:
            raise UserError(
                f"{folder}: its checkpoint was made with another configuration ({', '.join(changed)} changed); "
                "remove the folder or give the run another name"
            )

    def _check_stable_part(self, state: checkpoint.TrainingState, folder: Path) -> None:
        """A branch may only leave a WSD parent, after the warm-up and before the decay."""
        parent = validate(RunConfig, state.facts["config"], f"{folder}: its checkpoint")
        stable = range(warmup_steps(parent.schedule, parent.steps), decay_start(parent.schedule, parent.steps) + 1)
        if parent.schedule.kind != "wsd" or state.step not in stable:
            raise UserError(
                f"parent.step: {state.step} is not in the stable part of {parent.run}, "
                f"steps {stable.start} to {stable.stop - 1} of a WSD schedule"
            )


def _share_weights(model: GPT) -> GPT:
    """A plain model over the same parameters."""
    with torch.device("meta"):
        twin = GPT(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.cos, twin.sin = model.cos, model.sin
    return twin.eval()


class _Recorder:
    """Drives a session to its end and keeps its record, whatever happens."""

    def __init__(self, session: _Session, loader: Loader, records_dir: Path, on_log: OnLog | None) -> None:
        self._session = session
        self._loader = loader
        self._records_dir = records_dir
        self._on_log = on_log
        self._progress = ProgressFile(session.folder)
        self._events = EventFile(session.folder, session.step)
        self._rows_in_events = len(session.log.rows)
        self._writer = checkpoint.CheckpointWriter(session.folder, session.config.keep_checkpoints_at)
        self._next_flush = 0.0
        self._bad_output: str | None = None
        provenance = records.collect_provenance(device_name(session.device))
        provenance.data_sha256 = session.dataset.sha256
        provenance.tokenizer_sha256 = session.dataset.tokenizer_sha256
        session.started_utc = session.started_utc or provenance.started_utc
        provenance.started_utc = session.started_utc
        self.record = records.started(session.config, provenance, emulated=session.emulated)
        self.record.conversion = session.conversion
        if session.config.parent is not None:
            self.record.parent = records.Parent(**session.config.parent.model_dump())

    def run(self) -> TrainRecord:
        """Train to the end, and write the record as it then is."""
        try:
            self._write("running")
            with _stop_signals() as received:
                self._loop(received)
            self._finish()
        except Interrupted as error:
            self._write("interrupted", str(error))
            raise
        except Diverged as error:
            self._write("diverged", str(error))
            raise
        except BaseException as error:
            self._write_failure(_one_line(error))
            raise
        finally:
            self._events.close()
        return self.record

    def _loop(self, received: list[int]) -> None:
        session, config = self._session, self._session.config
        self._report("training", now=True)
        with _prefetched(self._loader, session.step, session.steps, session.device) as batches:
            for batch in batches:
                session.take_step(batch)
                if received:
                    self._save(wait=True)
                    raise Interrupted(received[0], session.step)
                if time.monotonic() >= self._next_flush or session.step == session.steps:
                    self._flush()
                if config.validation_interval and session.step % config.validation_interval == 0:
                    self._validate()
                is_due = session.step % config.checkpoint_interval == 0 or session.step in config.keep_checkpoints_at
                if is_due and session.step < session.steps:
                    self._save(wait=False)
        if not session.validated():
            self._validate()
        self._save(wait=True)

    def _finish(self) -> None:
        session, record = self._session, self.record
        checkpoint.save_final(session.folder, session.bf16_model, session.config)
        record.samples = self._samples()
        metrics = session.log.table()
        by_domain = {
            row["domain"]: DomainLoss(loss=row["loss"], bits_per_byte=row["bits_per_byte"])
            for row in session.validation[-len(session.dataset.weights) :]
        }
        weights = session.dataset.weights
        record.final = FinalLosses(
            train_loss=float(metrics["loss"].tail(FINAL_LOSS_ROWS).mean()),
            validation_loss=sum(weights[domain] * loss.loss for domain, loss in by_domain.items()),
            bits_per_byte=sum(weights[domain] * loss.bits_per_byte for domain, loss in by_domain.items()),
            by_domain=by_domain,
        )
        self._write("finished")
        self._report("done", now=True)

    def _validate(self) -> None:
        self._report("validating", now=True)
        self._session.validate()
        self._events.add_validation(self._session.validation[-len(self._session.dataset.weights) :])

    def _save(self, *, wait: bool) -> None:
        """Checkpoint, and bring the record's tables up to date."""
        self._report("saving", now=wait)
        self._writer.save(self._session.state())
        if wait:
            self._writer.wait()
        self._write("running")

    def _flush(self) -> None:
        self._next_flush = time.monotonic() + FLUSH_SECONDS
        session = self._session
        session.log.flush(wait=session.step == session.steps)
        self._events.add_metrics(session.log.rows[self._rows_in_events :])
        self._rows_in_events = len(session.log.rows)
        self._report("training")
        if self._on_log is not None:
            self._on_log(session.log.table, session.validation_table)
        self._check_diverged()

    def _check_diverged(self) -> None:
        session = self._session
        rows = session.log.rows[-1:]
        if not rows or not rows[0]["skipped"] or int(session.guard.skipped_in_a_row) < DIVERGED_AFTER:
            return
        # The weights are still those of the first bad step: what fails now failed then.
        tokens = torch.from_numpy(self._loader.batch(session.step - 1)[: session.config.micro_batch, :-1])
        self._bad_output = first_non_finite_output(session.model, tokens.to(session.device))
        step, layer = self._first_bad()
        raise Diverged(
            f"{DIVERGED_AFTER} steps in a row were skipped"
            + (f"; the first loss or gradient that is not finite was at step {step}, in {layer}" if step else "")
        )

    def _first_bad(self) -> tuple[int | None, str | None]:
        """Number of the first step with a loss or gradient that is not finite, and the layer where it arose."""
        guard = self._session.guard
        step = int(guard.first_bad_step)
        if step < 0:
            return None, None
        is_bad = guard.first_bad_parameters.tolist()
        names = [name for name, _ in self._session.model.named_parameters()]
        bad_blocks = [name for name, bad in zip(names, is_bad, strict=True) if bad and name.startswith("blocks.")]
        if all(is_bad) or not bad_blocks:
            return step + 1, self._bad_output or "the forward pass"
        # Backward runs from the last layer to the first and hands non-finite values on: it began in the last.
        return step + 1, bad_blocks[-1].removesuffix(".weight")

    def _samples(self) -> list[str]:
        """The model's continuation of the start of each domain's validation text."""
        session = self._session
        encoding = session.dataset.encoding
        texts = []
        for domain in session.dataset.weights:
            seq_len = session.config.model.seq_len
            windows, _ = session.dataset.validation_windows(domain, seq_len, seq_len)
            start = [token for token in windows[0, :SAMPLE_PROMPT_TOKENS].tolist() if token != encoding.eot_token]
            prompt = encoding.decode(start)
            texts.append(prompt + generate(session.bf16_model, encoding, prompt, max_tokens=SAMPLE_TOKENS))
        return texts

    def _report(self, stage: Any, *, now: bool = False) -> None:
        self._progress.update(lambda: self._current(stage), now=now)

    def _current(self, stage: Any) -> Progress:
        session = self._session
        rows = session.log.rows[-FINAL_LOSS_ROWS:]
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
            bf16_mfu=flops.bf16_mfu(session.config.model, speed) if speed and on_gpu else None,
            eta_seconds=left / speed if speed else None,
        )

    def _write(self, status: records.Status, reason: str | None = None) -> None:
        session, record = self._session, self.record
        metrics = session.log.table()
        step, layer = self._first_bad()
        record.status, record.reason = status, reason
        record.steps, record.tokens = session.step, session.tokens
        record.flops = records.Flops(**flops.flops_record(session.config.model, session.tokens))
        record.provenance.ended_utc = records.utc_now()
        record.provenance.epochs = self._loader.epochs(session.step)
        record.stability = Stability(
            spike_score=spike_score(metrics["loss"]),
            skipped_steps=int(session.guard.skipped),
            first_bad_step=step,
            first_bad_layer=layer,
        )
        record.speed = self._speed(metrics)
        folder = records.write(record, self._records_dir)
        records.write_table(folder, "metrics", metrics)
        records.write_table(folder, "validation", session.validation_table())

    def _write_failure(self, reason: str) -> None:
        """Record the failure as fully as what failed allows."""
        try:
            self._write("failed", reason)
        except Exception:
            # The device or the disk may be what failed: then the reason alone, where it can be written.
            with contextlib.suppress(OSError):
                records.write(self.record, self._records_dir)

    def _speed(self, metrics: pd.DataFrame) -> Speed | None:
        session = self._session
        warm = metrics[metrics["step"] > session.resumed_at + WARMUP_ROWS * session.config.log_interval]
        if warm.empty:
            return None
        median = session.config.global_batch_tokens / warm["step_ms"].median() * 1e3
        on_gpu = session.device.type == "cuda"
        return Speed(
            tokens_per_second_median=median,
            tokens_per_second_end_to_end=session.own_tokens / session.wall_seconds,
            bf16_mfu=flops.bf16_mfu(session.config.model, median) if on_gpu else None,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
            wall_seconds=session.wall_seconds,
        )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def _prefetched(loader: Loader, first: int, last: int, device: torch.device) -> Iterator[Iterator[Tensor]]:
    """Batches of steps `first` to `last` - 1, a few of them loaded ahead by a thread."""

    def load(step: int) -> Tensor:
        batch = torch.from_numpy(loader.batch(step))
        return batch.pin_memory() if device.type == "cuda" else batch

    def batches() -> Iterator[Tensor]:
        queue: collections.deque[Future[Tensor]] = collections.deque()
        for step in range(first, last):
            while len(queue) < PREFETCH_BATCHES and step + len(queue) < last:
                queue.append(executor.submit(load, step + len(queue)))
            yield queue.popleft().result()

    executor = ThreadPoolExecutor(1, thread_name_prefix="loader")
    try:
        yield batches()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one has its usual effect."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for other, handler in previous.items():
            signal.signal(other, handler)

    for stop_signal in (signal.SIGTERM, signal.SIGINT):
        previous[stop_signal] = signal.signal(stop_signal, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fp8lab.trainer CONFIG.json``: exit code 0, 1 failed, 2 bad input, 130 or 143 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fp8lab.trainer", description="Train one run without a notebook.")
    parser.add_argument("config", type=Path, help="a run's resolved configuration (JSON)")
    parser.add_argument("--records-dir", type=Path, default=Path("runs/records"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--checkpoints-dir", type=Path, default=Path("checkpoints"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="fp8lab: %(message)s")
    try:
        record = train(
            read_run_config(options.config),
            records_dir=options.records_dir,
            data_dir=options.data_dir,
            checkpoints_dir=options.checkpoints_dir,
        )
    except UserError as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"fp8lab: stopped by {error}", file=sys.stderr)
        return error.exit_code
    except Diverged as error:
        print(f"fp8lab: {error}", file=sys.stderr)
        return 1
    assert record.final is not None
    print(f"{record.plan}/{record.run}: validation loss {record.final.validation_loss:.4f} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
