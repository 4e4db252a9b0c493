"""Several GPUs, on one host or on many: who computes what, who holds what, and what all must agree on.

torchrun, or the notebook through the same elastic launcher, starts one process a GPU. They call each other
*ranks*, and each runs the whole trainer on its own rows of the global batch. Only the leader, rank 0,
writes records, progress and events. What a rank holds is the run's `sharding`:

=========  =====================================================================================
``ddp``    all weights, gradients and moments; gradients are summed over ranks as backward makes
           them (DistributedDataParallel)
``fsdp``   its share of each, dimension 0 cut into as many parts as there are ranks; a block's
           weights are gathered when the block needs them (FSDP2, `fully_shard`: ZeRO stage 3)
=========  =====================================================================================

Beside its share a rank of ``fsdp`` holds some things whole, and for them more ranks save no memory:

- during a step, the embedding's weight, gathered (4 bytes a weight), and its gradient;
- with `fused`, from the first forward pass to the step's end, both FP8 copies of all blocks' matrices (2 bytes
  a weight): they are cast once a step, whatever the micro-steps, from weights that are gathered for moments;
- during a validation, all weights in FP32 on every rank (4 bytes a weight), because each rank reads texts of its own;
- during a health probe and at the end of the run, the same on the leader alone.

Neither changes a result but by rounding, so a run may go on with another sharding and on another number of GPUs.
Weights are FP32, are gathered in FP32, and are rounded to BF16 or FP8 where one GPU would: a BF16 gather would
halve the traffic, but round norm gains, and FP8 weights twice. The objective is divided by the number of
micro-batches of all ranks, and gradients are summed, in FP32: so what backward computes, and an FP8 recipe
scales, does not depend on how many ranks there are. Whatever decides over a step (loss, gradient norm, amax) is
reduced over the ranks first: all decide alike.

All hosts see one file system: data, records and checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
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
    group: dist.ProcessGroup | None = None
    """Network that they agree over; None: the default one."""

    @property
    def leads(self) -> bool:
        """True for the one rank that writes what there is one of."""
        return self.rank == 0

    def largest(self, value: int) -> int:
        """The largest `value` of any rank, through the CPUs' network: no device waits for it."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return int(values)

    def wait(self) -> None:
        """Wait until every rank is here: torchrun stops the rest as soon as one has left with an error code."""
        self.largest(0)

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the leader, where alone it is done; what it raises there, all raise."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, group=self.group, device=torch.device("cpu"))
        result, raised = outcome
        if raised is not None:
            raise raised
        return cast(T, result)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over ranks, in place; on a GPU only queued."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The largest `values` of any rank, in place; on a GPU only queued."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def apart(self) -> World:
        """The same ranks with a network of their own, for a thread beside the one that trains."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.size > 1 else self


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


def share(objective: nn.Module, blocks: Iterable[nn.Module], sharding: Sharding, world: World) -> nn.Module:
    """`objective` as one rank of `world` calls it. Call it after `fp8lab.precision.convert`, before the optimizer.

    Args:
        objective: from token ids to the loss, so that it owns every use of a weight.
        blocks: its parts whose weights FSDP gathers together; the rest are gathered for the whole step.
    """
    if world.size == 1:
        return objective
    return _sharded(objective, blocks, world) if sharding == "fsdp" else _replicated(objective)


def _sharded(objective: nn.Module, blocks: Iterable[nn.Module], world: World) -> nn.Module:
    # A fused block returns a view; what follows a block changes it nowhere in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))
    for module in (*blocks, objective):
        sharded = fully_shard(module, mesh=mesh)
        # Sums, where FSDP by itself would average.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return objective


def _replicated(objective: nn.Module) -> nn.Module:
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
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
    if isinstance(objective, DistributedDataParallel) and not last:
        with objective.no_sync():
            yield
    else:
        yield


def is_sharded(objective: nn.Module) -> bool:
    """True where the rank holds a share of the weights alone."""
    return isinstance(objective, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(shares: Mapping[str, Tensor], world: World, *, everywhere: bool) -> dict[str, Tensor]:
    """Whole tensors of what the ranks hold of each; all ranks ask together.

    Args:
        shares: by name, the sharded tensors.
        everywhere: every rank gets them; otherwise the leader alone, and the others nothing.

    Raises:
        torch.OutOfMemoryError: on all ranks, if one of them has no memory for it.
    """
    wanted = everywhere or world.leads
    own: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    # All of it before anything is sent: who fails on the way leaves the others waiting.
    try:
        own = {name: _evenly(share, world.size) for name, share in shares.items()}
        whole = {name: _room_for(share, world.size) for name, share in own.items()} if wanted else {}
    except torch.OutOfMemoryError:
        own.clear()
    if world.largest(len(shares) - len(own)):
        raise torch.OutOfMemoryError(f"no memory to gather {len(shares)} sharded tensors")
    for name, share in own.items():
        if everywhere:
            dist.all_gather_into_tensor(whole[name], share)
        else:
            dist.gather(share, list(whole[name].chunk(world.size)) if wanted else None)
    return {name: tensor[: len(shares[name])] for name, tensor in whole.items()}


def _evenly(share: Tensor, size: int) -> Tensor:
    """What this rank holds of `share`, padded to as many rows as every rank holds."""
    own = local(share)
    missing = -(-len(share) // size) - len(own)
    return own if not missing else torch.cat((own, own.new_empty(missing, *own.shape[1:])))


def _room_for(share: Tensor, size: int) -> Tensor:
    """Memory for the shares of all ranks, `share` being one."""
    return share.new_empty(size * len(share), *share.shape[1:])


@functools.cache
def _host_mesh(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


def on_host(tensor: Tensor, copy: Tensor) -> Tensor:
    """`copy`, this rank's share of `tensor` in host memory, as the share that it is."""
    if not isinstance(tensor, DTensor):
        return copy
    mesh = _host_mesh(tensor.device_mesh.size())
    return DTensor.from_local(copy, mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


@torch.no_grad()
def norms(gradients: Sequence[Tensor]) -> Tensor:
    """(gradients,) L2 norm of each gradient, whole or shared."""
    values = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        squares = values.square()
        dist.all_reduce(squares)
        values = squares.sqrt()
    return values
