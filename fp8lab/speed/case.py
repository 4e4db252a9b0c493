"""One case: its contestants warm up, then take turns on one set of weights."""

from __future__ import annotations

import itertools
import math
import statistics
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8lab import flops
from fp8lab.model import GPT
from fp8lab.precision import uses_fp8
from fp8lab.speed.batches import Batches
from fp8lab.speed.breakdown import gemm_times, profile
from fp8lab.speed.contestants import build, fused_settings, initialised
from fp8lab.speed.plan import Contestant, SpeedCase, SpeedPlan
from fp8lab.speed.step import optimizer_step
from fp8lab.timing import Telemetry
from fp8lab.training.compilation import compile_blocks
from fp8lab.training.device import release_memory
from fp8lab.training.failures import one_line

SETTLING_STEPS = 2
"""Untimed steps after a change of contestant: the allocator's cache fills again."""
TELEMETRY_SECONDS = 0.02
"""Between readings of clock and power, while the host waits for the GPU."""
QUEUEING_TELEMETRY_SECONDS = 0.5
"""The same while it queues steps, which a reading holds up."""
MINIMUM_ROUNDS = 2
ERROR_LENGTH = 500
"""Characters; compilers say much more."""


@dataclass
class _Entrant:
    """A contestant with its model."""

    contestant: Contestant
    model: GPT
    first_step_seconds: float = 0.0
    """From its conversion to the end of its first step: compilation, most of it."""
    warmup_losses: list[float] = field(default_factory=list)


class Measurement:
    """One case, from building the models to its rows."""

    def __init__(
        self, plan: SpeedPlan, case: SpeedCase, device: torch.device, batches: Batches, deadline: float
    ) -> None:
        self._plan, self._case, self._device, self._deadline = plan, case, device, deadline
        self._batches = [batch.to(device) for batch in batches(case)]
        # Recompiling for each recipe and case must not run into dynamo's limit, after which it runs eagerly.
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        self._weights = initialised(case.sized_model, plan.seed, device)
        parameters = list(self._weights.parameters())
        self._optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
        self._results: dict[str, Any] = {"errors": {}, "contestants": {}}

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The case's results, and a row a timed step."""
        entrants = self._warm_up()
        rows = self._rounds(entrants)
        for entrant in entrants:
            settings = fused_settings(entrant.contestant)
            self._results["contestants"][entrant.contestant.name] = {
                "fused": settings.model_dump(mode="json") if settings else None,
                "first_step_seconds": entrant.first_step_seconds,
                "warmup_losses": entrant.warmup_losses,
                **self._speed(entrant, rows),
                "profile": self._profile(entrant),
            }
        if self._device.type == "cuda":
            release_memory(self._device)
            self._results["gemms"] = gemm_times(self._case.sized_model, self._case.tokens)
        return self._results, rows

    def _warm_up(self) -> list[_Entrant]:
        """Every contestant, compiled and warm; one that cannot run is left out, with its error in the results."""
        initial = [parameter.detach().clone() for parameter in self._weights.parameters()]
        entrants = []
        for contestant in self._case.contestants:
            with torch.no_grad():
                torch._foreach_copy_(list(self._weights.parameters()), initial)
            self._optimizer.state.clear()
            release_memory(self._device)
            try:
                began = time.perf_counter()
                entrant = _Entrant(contestant, self._build(contestant))
                losses = [self._step(entrant.model, 0)]
                self._synchronise()
                entrant.first_step_seconds = time.perf_counter() - began
                losses += [self._step(entrant.model, index) for index in range(1, self._plan.warmup_steps)]
                entrant.warmup_losses = [loss.item() for loss in losses]
                entrants.append(entrant)
            except Exception as error:
                # A contestant may be another project's code, and whatever it raises must not end the others' turns.
                self._results["errors"][contestant.name] = failure(error)
                self._optimizer.zero_grad(set_to_none=True)
        return entrants

    def _build(self, contestant: Contestant) -> GPT:
        model, version = build(self._weights, contestant)
        if version is not None:
            self._results.setdefault("peers", {})[contestant.recipe] = version
        if self._plan.compile:
            compile_blocks(model, self._device)
        return model

    def _step(self, model: GPT, index: int) -> Tensor:
        """One optimizer step; returns its loss, on the device."""
        return optimizer_step(model, self._optimizer, self._batches[index % len(self._batches)])

    def _rounds(self, entrants: list[_Entrant]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        heated = time.monotonic() + self._plan.heat_up_seconds
        while time.monotonic() < heated:
            for entrant in entrants:
                self._turn(entrant, 0)
        for turn in range(self._plan.rounds):
            if turn >= MINIMUM_ROUNDS and time.monotonic() > self._deadline:
                break
            for entrant in entrants:
                rows.extend(self._turn(entrant, turn))
        return rows

    def _turn(self, entrant: _Entrant, turn: int) -> list[dict[str, Any]]:
        """The timed steps of one contestant's turn."""
        release_memory(self._device)
        on_gpu = self._device.type == "cuda"
        steps = max(self._plan.steps_per_round, math.ceil(self._plan.seconds_per_turn / self._settle(entrant.model)))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        telemetry = Telemetry()
        milliseconds = self._timed(entrant.model, steps, telemetry)
        model = self._case.sized_model
        return [
            {
                "model": model.name,
                "seq_len": model.seq_len,
                "micro_batch": self._case.micro_batch,
                "recipe": entrant.contestant.recipe,
                "head": entrant.contestant.head,
                "round": turn,
                "step": step,
                "step_ms": step_ms,
                "tokens": self._case.tokens,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
                "sm_clock_mhz": telemetry.median_clock_mhz,
                "power_w": telemetry.median_power_w,
            }
            for step, step_ms in enumerate(milliseconds)
        ]

    def _settle(self, model: GPT) -> float:
        """Take the untimed steps; returns about how many seconds one takes, the host's part included."""
        for index in range(SETTLING_STEPS):
            self._synchronise()
            began = time.perf_counter()
            self._step(model, index)
        self._synchronise()
        return time.perf_counter() - began

    def _timed(self, model: GPT, steps: int, telemetry: Telemetry) -> list[float]:
        """Milliseconds of each of `steps` steps; the host runs ahead, as in training, and reads clock and power."""
        if self._device.type != "cuda":
            times = [time.perf_counter()]
            for index in range(steps):
                self._step(model, index)
                times.append(time.perf_counter())
            return [(end - start) * 1e3 for start, end in itertools.pairwise(times)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        last_read = time.perf_counter()
        for index in range(steps):
            self._step(model, index)
            events[index + 1].record()
            if time.perf_counter() - last_read > QUEUEING_TELEMETRY_SECONDS:
                telemetry.read()
                last_read = time.perf_counter()
        while not events[-1].query():
            telemetry.read()
            time.sleep(TELEMETRY_SECONDS)
        self._synchronise()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    def _speed(self, entrant: _Entrant, rows: list[dict[str, Any]]) -> dict[str, Any]:
        contestant, model = entrant.contestant, self._case.sized_model
        own = [row for row in rows if (row["recipe"], row["head"]) == (contestant.recipe, contestant.head)]
        step_ms = statistics.median(row["step_ms"] for row in own)
        per_second = self._case.tokens / step_ms * 1e3
        on_gpu = self._device.type == "cuda"
        return {
            "step_ms_median": step_ms,
            "tokens_per_second": per_second,
            "bf16_mfu": flops.bf16_mfu(model, per_second) if on_gpu else None,
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in own) if on_gpu else None,
            "fp8": contestant.recipe != "te_bf16" and uses_fp8(contestant.recipe, contestant.head),  # type: ignore[arg-type]
        }

    def _profile(self, entrant: _Entrant) -> dict[str, Any] | None:
        """`breakdown.profile` of a contestant's step; None on a CPU."""
        if self._device.type != "cuda":
            return None
        release_memory(self._device)
        self._step(entrant.model, 0)
        self._synchronise()
        return profile(lambda index: self._step(entrant.model, index))

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def failure(error: Exception) -> dict[str, str]:
    """The exception being handled as a record gives it: in a line, and where it came from."""
    return {"error": one_line(error)[:ERROR_LENGTH], "traceback": traceback.format_exc()}
