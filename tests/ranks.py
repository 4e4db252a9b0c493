"""One rank of several runs in turn, on tokens made by a rule: ``torchrun -m tests.ranks CONFIGS.json ROOT``."""

import json
import sys
from pathlib import Path

from fp8lab import distributed, trainer
from fp8lab.config import RunConfig
from tests import rule_data

if __name__ == "__main__":
    trainer.open_data = rule_data.open_data
    configs, root = map(Path, sys.argv[1:])
    folders = {name: root / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    for values in json.loads(configs.read_text()):
        trainer.train(RunConfig(**values), **folders)
    distributed.part()
