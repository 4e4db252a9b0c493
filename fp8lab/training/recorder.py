"""The record of a run in progress: what the session has measured so far, as the run's folder of records holds it.

It is written when the run starts, at every checkpoint and at the end, whichever end that is. The tables are written
before ``record.json``, so that one which says 'finished' says that all is there.
"""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

from fp8lab import flops, records
from fp8lab.data import Loader
from fp8lab.errors import UserError
from fp8lab.generation import generate
from fp8lab.model import GPT
from fp8lab.provenance import collect_provenance, utc_now
from fp8lab.records import DomainLoss, FinalLosses, Speed, Stability, TrainRecord, ValidationLosses
from fp8lab.training.device import device_name
from fp8lab.training.divergence import Diverged, Divergence
from fp8lab.training.health import overflow_counts
from fp8lab.training.session import Session

log = logging.getLogger(__name__)

FINAL_LOSS_ROWS = 20
"""Logged rows of steps not skipped that the final training loss is the mean of."""
WARMUP_ROWS = 5
"""Rows after a (re)start that the median step time leaves out: compilation and first touches."""
SAMPLE_PROMPT_TOKENS = 16
SAMPLE_TOKENS = 48


class Recorder:
    """Keeps the record of a session; ranks that do not lead have one that is never written."""

    def __init__(self, session: Session, loader: Loader, divergence: Divergence, records_dir: Path) -> None:
        self._session = session
        self._loader = loader
        self._divergence = divergence
        self._records_dir = records_dir
        world = session.world
        provenance = collect_provenance(device_name(session.device), world.size, world.hosts)
        provenance.data_sha256 = session.dataset.sha256
        provenance.tokenizer_sha256 = session.dataset.tokenizer_sha256
        provenance.started_utc = session.started_utc
        self.record: TrainRecord = records.started(session.config, provenance, emulated=session.emulated)
        self.record.conversion = session.conversion
        if session.config.parent is not None:
            self.record.parent = records.Parent(**session.config.parent.model_dump())

    def write(self, status: records.Status, reason: str | None = None) -> None:
        """Bring the record up to date; waits for the device."""
        if not self._session.world.leads:
            return
        self._note(status, reason)
        self.record.speed = _speed(self._session)
        self.record.stability = self._stability()
        self._write_tables()
        records.write(self.record, self._records_dir)

    def write_failure(self, reason: str) -> None:
        """Record the failure, then as much of the run as what failed allows."""
        if not self._session.world.leads:
            return
        # Each part by itself: the device may never answer again, or the disk may be what failed.
        self._note("failed", reason)
        with contextlib.suppress(OSError, ValueError, UserError):
            records.write(self.record, self._records_dir)
        with contextlib.suppress(OSError):
            self._write_tables()
        with contextlib.suppress(Exception):
            self.write("failed", reason)

    def _note(self, status: records.Status, reason: str | None) -> None:
        """What the host knows of the run, into the record."""
        session, record = self._session, self.record
        record.status, record.reason = status, reason
        record.steps, record.tokens = session.step, session.tokens
        record.flops = records.Flops(**flops.flops_record(session.config.model, session.tokens))
        record.provenance.ended_utc = utc_now()
        record.provenance.epochs = self._loader.epochs(session.step)

    def _write_tables(self) -> None:
        """Every row that has arrived on the host."""
        session = self._session
        folder = records.record_dir(self._records_dir, session.config.plan, session.config.run)
        records.write_table(folder, "metrics", session.log.table())
        records.write_table(folder, "validation", session.validation_table())
        health = session.health.table()
        if not health.empty:
            records.write_table(folder, "health", health)

    def _stability(self) -> Stability:
        """Signs of instability so far."""
        session = self._session
        step, layer = self._divergence.first_bad()
        counts = overflow_counts(session.model)
        return Stability(
            spike_score=session.spikes.score,
            judged_steps=session.spikes.judged,
            first_spike_step=session.spikes.first_step,
            skipped_steps=int(session.guard.skipped),
            first_bad_step=step,
            first_bad_layer=layer,
            saturated_steps=counts and counts.saturated,
            underflowing_steps=counts and counts.underflowing,
        )


def _speed(session: Session) -> Speed | None:
    """The session's speed as far as it has been measured; None before the first step."""
    if not session.own_tokens:
        return None
    median, seconds = _median_speed(session), session.wall_seconds
    on_gpu = session.device.type == "cuda"
    return Speed(
        tokens_per_second_median=median,
        tokens_per_second_end_to_end=session.own_tokens / seconds,
        bf16_mfu=flops.bf16_mfu(session.config.model, median, session.world.size) if median and on_gpu else None,
        peak_memory_bytes=session.peak_memory_bytes,
        wall_seconds=seconds,
    )


def _median_speed(session: Session) -> float | None:
    """Tokens per second of the median logged step, the first rows after each start left out."""
    rows = session.log.table()
    warmup = WARMUP_ROWS * session.config.log_interval
    for start in session.starts:
        rows = rows[(rows["step"] <= start) | (rows["step"] > start + warmup)]
    return None if rows.empty else float(session.config.global_batch_tokens / rows["step_ms"].median() * 1e3)


def final_losses(session: Session) -> FinalLosses:
    """Losses after the last step; all ranks ask together, and have the same.

    Raises:
        Diverged: a validation loss is not finite: these weights are no result.
    """
    last = session.validation[-len(session.dataset.weights) :]
    for row in last:
        if not math.isfinite(row["loss"]):
            raise Diverged(f"the validation loss of {row['domain']} after the last step is {row['loss']}")
    by_domain = {row["domain"]: DomainLoss(loss=row["loss"], bits_per_byte=row["bits_per_byte"]) for row in last}
    return FinalLosses(
        train_loss=_final_train_loss(session), averaged=_averaged_losses(session), **_weighted(session, by_domain)
    )


def _averaged_losses(session: Session) -> ValidationLosses | None:
    """Of the averaged weights, where an average is kept and its losses are finite."""
    by_domain = session.validate_average()
    if by_domain is None:
        return None
    if not all(math.isfinite(loss.loss) for loss in by_domain.values()):
        log.warning("the averaged weights of %s have no finite validation loss", session.config.run)
        return None
    return ValidationLosses(**_weighted(session, by_domain))


def _final_train_loss(session: Session) -> float | None:
    """Mean of the last losses that were learned from: the guard lets none through that is not finite."""
    rows = session.log.table()
    taken = rows.loc[~rows["skipped"], "loss"].tail(FINAL_LOSS_ROWS)
    return None if taken.empty else float(taken.mean())


def _weighted(session: Session, by_domain: dict[str, DomainLoss]) -> dict[str, Any]:
    """Losses by domain and their means by the mixture's weights, as a record holds them."""
    weights = session.dataset.weights
    return {
        "validation_loss": sum(weights[domain] * loss.loss for domain, loss in by_domain.items()),
        "bits_per_byte": sum(weights[domain] * loss.bits_per_byte for domain, loss in by_domain.items()),
        "by_domain": by_domain,
    }


def samples(session: Session, model: GPT) -> list[str]:
    """The model's continuation of the start of each domain's validation text."""
    encoding = session.dataset.encoding
    texts = []
    for domain in session.dataset.weights:
        seq_len = session.config.model.seq_len
        windows, _ = session.dataset.validation_windows(domain, seq_len, seq_len)
        start = [token for token in windows[0, :SAMPLE_PROMPT_TOKENS].tolist() if token != encoding.eot_token]
        prompt = encoding.decode(start)
        texts.append(prompt + generate(model, encoding, prompt, max_tokens=SAMPLE_TOKENS))
    return texts
