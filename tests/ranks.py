"""One rank of several runs in turn, on tokens made by a rule."""

import json
import math
import os
from pathlib import Path

import torch
from torch import distributed as dist

from fp8lab.config import RunConfig
from fp8lab.kernels import block
from fp8lab.training import distributed, session, trainer
from tests import rule_data
from tests.forks import errors_to

POISONED_RUN, POISONED_RANK, POISONED_STEP = "poisoned", 1, 3
CROWDED_RUN = "crowded"


def count_weight_casts() -> list[int]:
    """A list that grows by one whenever a fused block casts a weight."""
    casts: list[int] = []
    real = block._QuantisedWeight

    def counted(*arguments):
        casts.append(1)
        return real(*arguments)

    block._QuantisedWeight = counted
    return casts


def poison_one_rank() -> None:
    """Make one rank's loss of one step not a number."""
    real, calls = session.training_loss, []

    def training_loss(*arguments):
        calls.append(1)
        factor = math.nan if len(calls) == POISONED_STEP else 1.0
        objective, loss = real(*arguments)
        return objective * factor, loss * factor

    session.training_loss = training_loss


def crowd_the_leader() -> None:
    """Let the leader find no memory for whole weights, once."""
    real = distributed._room_for

    def room_for(*arguments):
        distributed._room_for = real
        raise torch.OutOfMemoryError

    distributed._room_for = room_for


def forked(rank: int, ranks: int, store: Path, configs: Path, root: Path) -> None:
    """Train what the JSON file `configs` lists on `ranks` processes, this the one of number `rank`; a fork's `main`.

    Args:
        store: file through which they meet, in place of torchrun's server.
    """
    errors_to(root / f"errors-{rank}.txt")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=ranks)
    trainer.open_data = rule_data.open_data
    folders = {name: root / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    casts, number = count_weight_casts(), {}
    for values in json.loads(configs.read_text()):
        config = RunConfig(**values)
        if (config.run, rank) == (POISONED_RUN, POISONED_RANK):
            poison_one_rank()
        if (config.run, rank) == (CROWDED_RUN, 0):
            crowd_the_leader()
        casts.clear()
        trainer.train(config, **folders)
        number[config.run] = len(casts)
    (root / f"casts-{rank}.json").write_text(json.dumps(number))
    distributed.part()
