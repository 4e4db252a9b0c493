"""The training worker, on tokens made by a rule: ``python -m tests.faults.worker CONFIG.json ...``."""

import sys

from fp8lab import trainer
from tests import rule_data

if __name__ == "__main__":
    trainer.open_data = rule_data.open_data
    sys.exit(trainer.main())
