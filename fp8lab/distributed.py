"""Several GPUs, on one host or on many: who computes what, who holds what, and what all must agree on.

torchrun, or the notebook through the same elastic launcher, starts one process a GPU. They call each other
*ranks*, and each runs the whole trainer on its own rows of the global batch. Only the leader, rank 0,
writes records, progress and events.

Every rank holds all weights, gradients and moments, and gradients are summed over ranks as backward makes them
(DistributedDataParallel). This changes no result but by rounding. The objective is divided by the number of
micro-batches of all ranks, and gradients are summed, in FP32: so what backward computes, and an FP8 recipe
scales, does not depend on how many ranks there are. Whatever decides over a step (loss, gradient norm, amax) is
reduced over the ranks first: all decide alike.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fp8lab.config import Sharding
from fp8lab.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train one run together; by default this one alone."""

    rank: int = 0
    size: int = 1
    hosts: int = 1

    @property
    def leads(self) -> bool:
        """True for the one rank that writes what there is one of."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest `value` of any rank, through the CPUs' network: no device waits for it."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the leader, where alone it is done.

        Raises:
            UserError: it raised one there.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        result, problem = outcome
        if problem is not None:
            raise UserError(problem)
        return cast(T, result)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over ranks, in place; on a GPU only queued."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


ALONE = World()


def meet() -> World:
    """Meet the other ranks that torchrun has started; without it, a world of one.

    Raises:
        UserError: there are more processes on this host than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local_size > torch.cuda.device_count():
            raise UserError(f"{local_size} processes on a host with {torch.cuda.device_count()} GPUs; start one a GPU")
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return World(int(os.environ["RANK"]), size, size // local_size)


def part() -> None:
    """Leave the other ranks, if there were any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(objective: nn.Module, sharding: Sharding, world: World) -> nn.Module:
    """`objective` as one rank of `world` calls it. Call it after `fp8lab.precision.convert`."""
    if world.size == 1:
        return objective
    # Blocks are compiled one by one; this would cut each once more, along DDP's buckets.
    torch._dynamo.config.optimize_ddp = False
    with warnings.catch_warnings():
        # torch 2.13 renames an argument by a name that 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers are constants, or a recipe's scales, which the ranks agree on once a step.
        shared = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    # DDP wants the hook's annotations evaluated, or none.
    shared.register_comm_hook(None, lambda _, bucket: _summed(bucket))
    return shared


def _summed(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over ranks, where DDP by itself would average."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@contextlib.contextmanager
def micro_step(objective: nn.Module, *, last: bool) -> Iterator[None]:
    """Around the forward and backward of a micro-batch: gradients are summed over ranks after the `last` one."""
    if isinstance(objective, DistributedDataParallel) and not last:
        with objective.no_sync():
            yield
    else:
        yield
