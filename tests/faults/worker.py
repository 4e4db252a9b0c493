"""The training worker, on tokens made by a rule: ``python -m tests.faults.worker CONFIG.json ...``."""

import os
import sys
from pathlib import Path

# A run imports this for its first tensor without data: once here, not in every fork.
import torch._dynamo  # noqa: F401

from fp8lab import trainer
from tests import rule_data


def main(arguments: list[str]) -> int:
    """`fp8lab.trainer.main` on the rule's tokens."""
    trainer.open_data = rule_data.open_data
    return trainer.main(arguments)


def forked(arguments: list[str], errors: Path) -> None:
    """`main` in a process forked from one that has imported everything; standard error goes to a file."""
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
