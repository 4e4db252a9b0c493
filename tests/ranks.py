"""One rank of several runs in turn, on tokens made by a rule: ``torchrun -m tests.ranks CONFIGS.json ROOT``."""

import json
import math
import os
import sys
from pathlib import Path

import torch

from fp8lab import distributed, session, trainer
from fp8lab.config import RunConfig
from fp8lab.kernels import block
from tests import rule_data

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


if __name__ == "__main__":
    trainer.open_data = rule_data.open_data
    configs, root = map(Path, sys.argv[1:])
    folders = {name: root / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    casts, number = count_weight_casts(), {}
    for values in json.loads(configs.read_text()):
        config = RunConfig(**values)
        if (config.run, int(os.environ["RANK"])) == (POISONED_RUN, POISONED_RANK):
            poison_one_rank()
        if (config.run, os.environ["RANK"]) == (CROWDED_RUN, "0"):
            crowd_the_leader()
        casts.clear()
        trainer.train(config, **folders)
        number[config.run] = len(casts)
    (root / f"casts-{os.environ['RANK']}.json").write_text(json.dumps(number))
    distributed.part()
