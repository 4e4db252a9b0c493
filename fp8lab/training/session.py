"""A run on its device: the state of one training run, and the optimizer step that advances it.

One step: for each micro-batch, forward under BF16 autocast and backward into FP32 gradients; their
global norm; the guard's verdict; then fused AdamW on the FP32 master weights, which clips and skips on
the device. The host only queues work: it reads losses later, in bunches.

A session writes no record and knows nothing of signals and progress: `fp8lab.training.trainer` drives it,
`fp8lab.training.recorder` reads it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from fp8lab.config import MAY_CHANGE, RunConfig, changed_fields, earlier_config
from fp8lab.cpu import bf16_autocast, keep_freed_memory
from fp8lab.data import TokenDataset
from fp8lab.errors import OutOfMemory, UserError
from fp8lab.kernels import end_step
from fp8lab.loss import training_loss
from fp8lab.model import GPT
from fp8lab.precision import check_kernels, convert, fp8_tensor_cores, uses_fp8
from fp8lab.provenance import utc_now
from fp8lab.records import DomainLoss
from fp8lab.schedule import decay_start, learning_rate_fraction, warmup_steps
from fp8lab.spikes import SpikeCount
from fp8lab.training import checkpoint, distributed
from fp8lab.training.averaging import WeightAverage
from fp8lab.training.compilation import compile_blocks, drop_other_graphs
from fp8lab.training.device import device_name, release_memory, training_device
from fp8lab.training.distributed import ALONE, World
from fp8lab.training.guard import StepGuard
from fp8lab.training.health import HealthLog, HealthProbe, forget_overflows
from fp8lab.training.metrics import Arrivals, MetricsLog, Stopwatch
from fp8lab.training.validation import VALIDATION_TYPES, share_weights, validation_losses

log = logging.getLogger(__name__)

AVERAGE_PREFIX = "average."
"""Begins the names of averaged weights among a checkpoint's tensors."""
BRANCH_MAY_CHANGE = MAY_CHANGE | {"run", "parent", "tokens", "schedule", "log_interval", "average_half_life"}
"""Fields in which a decay branch may differ from its parent."""


def make_optimizer(model: GPT, config: RunConfig) -> torch.optim.AdamW:
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


def check_model(config: RunConfig) -> None:
    """Raise what building the run's model would raise, in an instant and without memory for it.

    Raises:
        UserError: the recipe cannot convert the model, or a pattern matches no Linear of it.
    """
    with torch.device("meta"):
        model, plain = GPT(config.model), GPT(config.model)
    conversion = convert(model, config.recipe, config.head, config.high_precision, fused=config.fused)
    HealthProbe(config, model, plain, conversion)


class Objective(nn.Module):
    """The loss as a module, so that what wraps a model for several GPUs sees both uses of the tied weight."""

    def __init__(self, model: GPT, z_loss: float) -> None:
        super().__init__()
        self.model = model
        self._z_loss = z_loss

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and cross-entropy (see `training_loss`) of token ids (batch, seq + 1)."""
        with bf16_autocast(tokens.device):
            hidden = self.model.hidden(tokens[:, :-1])
            return training_loss(self.model, hidden, tokens[:, 1:], self._z_loss)


class Session:
    """The state of one run on one device, and the step that advances it; with several GPUs, one rank's."""

    def __init__(self, config: RunConfig, dataset: TokenDataset, folder: Path, world: World = ALONE) -> None:
        self.config = config
        self.world = world
        self.dataset = dataset
        self.folder = folder
        self.device = training_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            # This process may have trained another run before.
            torch.cuda.reset_peak_memory_stats()
        self.emulated = uses_fp8(config.recipe, config.head) and not fp8_tensor_cores()
        check_kernels(config.model, config.recipe, config.head, self.device)
        self.model = GPT(config.model)
        self.model.initialise(config.seed)
        self.model.to(self.device)
        # The weights' BF16 view of themselves: validation measures weights, whatever the recipe computes in.
        self.bf16_model = share_weights(self.model)
        self.conversion = convert(self.model, config.recipe, config.head, config.high_precision, fused=config.fused)
        self.model.train()
        self.model.checkpoint_activations = config.activation_checkpointing
        self._objective = distributed.share(
            Objective(self.model, config.optimizer.z_loss), self.model.blocks, config.sharding, world
        )
        if self.is_sharded:
            self.bf16_model.to("meta")
        self.optimizer = make_optimizer(self.model, config)
        # Kept: walking the modules at every step would take the host longer than some of its kernels the GPU.
        self._parameters = list(self.model.parameters())
        self.guard = StepGuard(len(self._parameters), config.optimizer.skip_outliers).to(self.device)
        self.average: WeightAverage | None = None
        if config.average_half_life:
            parameters = dict(self.model.named_parameters())
            self.average = WeightAverage(parameters, config.average_half_life * config.steps)
        self.log = MetricsLog(self.device, config.global_batch_tokens)
        self.spikes = SpikeCount()
        self._losses: Arrivals[int] = Arrivals(self.device)
        self._probe = HealthProbe(config, self.model, self.bf16_model, self.conversion)
        self.health = HealthLog(self.device)
        self.validation: list[dict[str, Any]] = []
        self.step = 0
        self.resumed_at = 0
        self.earlier_seconds = 0.0
        self._earlier_starts: list[int] = []
        self._earlier_peak_memory_bytes = 0
        self.started_utc = utc_now()
        self.began = time.perf_counter()
        self.is_compiled = False
        if config.compile:
            drop_other_graphs(config)
            self.is_compiled = compile_blocks(self.model, self.device)

    @property
    def is_sharded(self) -> bool:
        """True where this rank holds a share of the state alone."""
        return distributed.is_sharded(self._objective)

    @contextlib.contextmanager
    def whole_weights(self, *, everywhere: bool = False) -> Iterator[GPT]:
        """`bf16_model` with its weights: a sharded run's are gathered for as long as this lasts.

        All ranks enter together; where the run is sharded, only the leader may use the model, unless `everywhere`.

        Raises:
            torch.OutOfMemoryError: on all ranks, if one of them has no memory for the weights.
        """
        model = self.bf16_model
        if not self.is_sharded:
            yield model
            return
        shares = {name: weight.detach() for name, weight in self.model.named_parameters()}
        weights = distributed.gather(shares, self.world, everywhere=everywhere)
        if weights:
            model.load_state_dict(weights, assign=True)
            model.cos, model.sin = self.model.cos, self.model.sin
        try:
            yield model
        finally:
            model.to("meta")

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def tokens(self) -> int:
        return self.step * self.config.global_batch_tokens

    @property
    def own_tokens(self) -> int:
        """Tokens trained on by this run itself, those of a branch's parent left out."""
        return self.tokens - self._first_step * self.config.global_batch_tokens

    @property
    def _first_step(self) -> int:
        """Steps done when the run began: those of a branch's parent."""
        return self.config.parent.step if self.config.parent else 0

    @property
    def starts(self) -> list[int]:
        """Steps done whenever a process took up the run, the first one included."""
        return sorted({self._first_step, *self._earlier_starts, self.resumed_at})

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most that a process of the run has allocated on this rank's GPU; None off the GPU."""
        if self.device.type != "cuda":
            return None
        return max(self._earlier_peak_memory_bytes, torch.cuda.max_memory_allocated())

    @property
    def wall_seconds(self) -> float:
        """Time spent on the run, interruptions excluded."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def take_step(self, batch: Tensor) -> None:
        """One optimizer step, logged; nothing here waits for the device.

        Args:
            batch: (rows, seq_len + 1) token ids, this rank's rows of the global batch.

        Raises:
            OutOfMemory: the step does not fit the device's memory.
        """
        config = self.config
        stopwatch = Stopwatch(self.device).start()
        lr = config.optimizer.peak_learning_rate * learning_rate_fraction(config.schedule, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = batch.to(self.device, non_blocking=True)
        fits = True
        try:
            loss, norm, skip = self._update(batch)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            # Not in the handler: the error's traceback keeps alive all that the attempt has allocated.
            raise OutOfMemory(self._advise_micro_batch(batch))
        end_step(self.model, skip, self.world.max)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step, skip)
        stopwatch.stop()
        self._losses.add(self.step, loss)
        if self.step % config.log_interval == 0 or self.step == self.steps:
            self.log.add(self.step, lr, torch.stack((loss, norm, skip.float())), stopwatch)

    def _update(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the batch, the guard's verdict on them, and the optimizer's step.

        Returns:
            The loss, the gradient norm, and whether the step was skipped: scalars.
        """
        config, optimizer = self.config, self.optimizer
        loss = self.world.sum(self._accumulate_gradients(batch, config.micro_batch))
        norms = distributed.norms([cast(Tensor, parameter.grad) for parameter in self._parameters])
        norm, skip = self.guard.judge(self.step, loss, norms)
        self._measure_health(batch, norms)
        # Fused AdamW divides gradients by grad_scale and leaves everything as it was where found_inf is 1:
        # clipping and skipping cost no pass over memory of their own.
        optimizer.grad_scale = (norm / config.optimizer.gradient_clip).clamp(min=1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, norm, skip

    def _measure_health(self, batch: Tensor, gradient_norms: Tensor) -> None:
        """Every `health_interval` steps, before the optimizer changes the weights."""
        config, step = self.config, self.step + 1
        interval = config.health_interval
        if not interval or step % interval:
            return
        values = None
        try:
            with self.whole_weights():
                if self.world.leads:
                    values = self._probe.measure(batch, gradient_norms)
        except torch.OutOfMemoryError:
            log.warning("no memory to gather the weights of %s for a health probe: a step is not measured", config.run)
        if values is not None:
            self.health.add(step, self._probe.rows, values)

    def flush(self, *, wait: bool) -> None:
        """Move what has arrived from the device into the tables (see `fp8lab.training.metrics`)."""
        self.log.flush(wait=wait)
        self.health.flush(wait=wait)
        if losses := self._losses.flush(wait=wait):
            self.spikes.add([step for step, _ in losses], [float(loss) for _, loss in losses])

    def _accumulate_gradients(self, batch: Tensor, micro_batch: int) -> Tensor:
        """Gradients of the mean loss over all ranks' batches, `micro_batch` sequences at a time.

        Returns:
            This rank's part of that loss: the ranks' sum is the mean.
        """
        micro_batches = batch.split(micro_batch)
        count = len(micro_batches) * self.world.size
        share = torch.full((), 1 / count, device=self.device)
        losses = []
        for index, tokens in enumerate(micro_batches, start=1):
            with distributed.micro_step(self._objective, last=index == len(micro_batches)):
                objective, loss = self._objective(tokens)
                objective.backward(share)
            losses.append(loss / count)
        return functools.reduce(torch.add, losses)

    def _advise_micro_batch(self, batch: Tensor) -> str:
        """Which micro-batch fits the device's memory, found by trying."""
        problem = (
            f"micro_batch: {self.config.micro_batch} sequences do not fit the memory of {device_name(self.device)}"
        )
        if self.world.size > 1:
            # One rank cannot try by itself.
            return f"{problem}; take a smaller one" + (", or sharding: fsdp" if self.config.sharding == "ddp" else "")
        for micro_batch in range(self.config.micro_batch // 2, 0, -1):
            if self.config.micro_batch % micro_batch == 0 and self._fits(batch[:micro_batch]):
                return f"{problem}; {micro_batch} do"
        return f"{problem}; not even 1 does: take a smaller model or seq_len, or activation_checkpointing"

    def _fits(self, rows: Tensor) -> bool:
        """Try a micro-batch, with the room that the optimizer has yet to take before its first step."""
        self.optimizer.zero_grad(set_to_none=True)
        release_memory(self.device)
        try:
            without = [parameter for parameter in self.model.parameters() if not self.optimizer.state.get(parameter)]
            moments = [torch.zeros_like(parameter) for parameter in without for _ in ("exp_avg", "exp_avg_sq")]
            self._accumulate_gradients(rows, len(rows))
            del moments
        except torch.OutOfMemoryError:
            return False
        return True

    def validate(self) -> None:
        """Loss and bits per byte of each domain's validation text, into `validation`."""
        with self.whole_weights(everywhere=True) as model:
            losses = self._losses_of(model)
        for domain, loss in losses.items():
            self.validation.append({"step": self.step, "tokens": self.tokens, "domain": domain} | loss.model_dump())

    def validate_average(self) -> dict[str, DomainLoss] | None:
        """Losses by domain of the averaged weights, None where no average is kept."""
        if self.average is None:
            return None
        return self._losses_of(share_weights(self.bf16_model, self.average.averages))

    def _losses_of(self, model: GPT) -> dict[str, DomainLoss]:
        return validation_losses(model, self.dataset, self.config, self.world, compiled=self.is_compiled)

    def forward(self, rows: Tensor) -> None:
        """The forward pass alone, of token ids (batch, seq + 1), for who watches the modules; all ranks together."""
        rows = rows.to(self.device)
        with bf16_autocast(self.device):
            # A sharded model's weights are gathered for the objective as a whole.
            self._objective(rows) if self.is_sharded else self.model(rows[:, :-1])

    def validated(self) -> bool:
        """True if the weights as they stand have been validated."""
        return bool(self.validation) and self.validation[-1]["step"] == self.step

    def state(self) -> checkpoint.TrainingState:
        """Everything to continue from; waits for the device."""
        self.flush(wait=True)
        model, optimizer, trainer = self._tensors()
        return checkpoint.TrainingState(
            step=self.step,
            model=model,
            optimizer=optimizer,
            trainer=trainer,
            metrics=self.log.table(),
            validation=self.validation_table(),
            health=self.health.table(),
            facts={
                "config": self.config.model_dump(mode="json"),
                "data_sha256": self.dataset.sha256,
                "mixture_weights": self.dataset.weights,
                "wall_seconds": self.wall_seconds,
                "started_utc": self.started_utc,
                "starts": self.starts,
                "peak_memory_bytes": self.peak_memory_bytes,
                "spikes": asdict(self.spikes),
            },
        )

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """All tensors to continue from, themselves: the model's, the optimizer's, and the rest."""
        optimizer = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        averages = {} if self.average is None else self.average.averages
        trainer = self.guard.state_dict() | {AVERAGE_PREFIX + name: average for name, average in averages.items()}
        return self.model.state_dict(), optimizer, trainer

    def validation_table(self) -> pd.DataFrame:
        """All validations so far."""
        return pd.DataFrame(self.validation, columns=list(VALIDATION_TYPES)).astype(VALIDATION_TYPES)

    def resume(self) -> None:
        """Continue from the folder's newest good checkpoint, if it has one.

        Raises:
            UserError: all are damaged, or they were made with another configuration or other data.
        """
        path = self.world.first(lambda: checkpoint.latest(self.folder))
        parent = self.config.parent
        if path is not None:
            history = checkpoint.load_history(path)
            self._check_compatible(history, self.folder, MAY_CHANGE)
            self._restore_tensors(path)
            self._restore_history(history)
        elif parent is not None:
            folder = self.folder.parent / parent.run
            path = self.world.first(lambda: checkpoint.at_step(folder, parent.step))
            history = checkpoint.load_history(path)
            self._check_compatible(history, folder, BRANCH_MAY_CHANGE)
            self._check_stable_part(history, folder)
            self._restore_tensors(path)
            self._leave_parent(history)

    def _restore_tensors(self, path: Path) -> None:
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        model, optimizer, trainer = self._tensors()
        checkpoint.load_tensors(path, model | optimizer | trainer, may_lack=self.guard.state_dict())
        # They are in place; this tells a recipe's state that it has changed.
        self.model.load_state_dict(model)

    def _restore_measurements(self, facts: Mapping[str, Any]) -> None:
        """What earlier processes measured of their speed; checkpoints from before it was kept say nothing of it."""
        self._earlier_starts = facts.get("starts", [])
        self._earlier_peak_memory_bytes = facts.get("peak_memory_bytes") or 0

    def _restore_history(self, state: checkpoint.History) -> None:
        rows = cast(list[dict[str, Any]], state.metrics.to_dict("records"))
        self.log = MetricsLog(self.device, self.config.global_batch_tokens, rows)
        self.validation = cast(list[dict[str, Any]], state.validation.to_dict("records"))
        self.health = HealthLog(self.device, state.health)
        self.spikes = _spikes_of(state)
        self.step = self.resumed_at = state.step
        self._restore_measurements(state.facts)
        self.earlier_seconds = state.facts["wall_seconds"]
        self.started_utc = state.facts["started_utc"]

    def _leave_parent(self, history: checkpoint.History) -> None:
        """Begin a branch from its parent's state; what its record counts are its own steps alone."""
        self.guard.forget_skipped()
        forget_overflows(self.model)
        self.spikes = SpikeCount(recent=_spikes_of(history).recent)
        self.step = self.resumed_at = history.step

    def _check_compatible(self, state: checkpoint.History, folder: Path, may_change: set[str]) -> None:
        before = earlier_config(state.facts["config"], f"{folder}: its checkpoint")
        changed = changed_fields(before, self.config, may_change)
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

    def _check_stable_part(self, state: checkpoint.History, folder: Path) -> None:
        """A branch may only leave a WSD parent, after the warm-up and before the decay."""
        parent = earlier_config(state.facts["config"], f"{folder}: its checkpoint")
        stable = range(warmup_steps(parent.schedule, parent.steps), decay_start(parent.schedule, parent.steps) + 1)
        if parent.schedule.kind != "wsd" or state.step not in stable:
            raise UserError(
                f"parent.step: {state.step} is not in the stable part of {parent.run}, "
                f"steps {stable.start} to {stable.stop - 1} of a WSD schedule"
            )


def _spikes_of(history: checkpoint.History) -> SpikeCount:
    """The count so far; checkpoints from before there was one begin it anew."""
    return SpikeCount(**history.facts.get("spikes", {}))
