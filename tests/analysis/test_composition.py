"""What the training text was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8lab.analysis.composition import bytes_per_token, data_record
from fp8lab.analysis.runs import training_runs
from fp8lab.errors import UserError
from tests.fixtures import write_demo_records


def test_bytes_of_a_token_are_weighted_as_training_draws_them(tmp_path: Path) -> None:
    write_demo_records(tmp_path)
    record = data_record(tmp_path, training_runs(tmp_path))
    assert record is not None
    for values in record.results["domains"].values():
        values["train"] |= {"text_bytes": 3000, "tokens": 1000}
    assert bytes_per_token(record) == pytest.approx(3.0)
    record.results["domains"]["prose"]["train"]["text_bytes"] = 4000
    assert bytes_per_token(record) == pytest.approx(3.65)
    del record.results["domains"]["prose"]["train"]["tokens"]
    with pytest.raises(UserError, match="tokens: missing"):
        bytes_per_token(record)
