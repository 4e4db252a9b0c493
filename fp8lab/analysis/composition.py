"""What training text was made of, as the build of its mixture recorded it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fp8lab import records
from fp8lab.analysis.runs import RunSet
from fp8lab.errors import UserError
from fp8lab.records import DataRecord
from fp8lab.units import unique

DATA_PLAN = "data"
"""Data builds are recorded under this plan, each as a run with the mixture's name."""


def data_record(records_dir: Path, runs: RunSet) -> DataRecord | None:
    """What the build of the mixture that `runs` trained on recorded, or None."""
    for mixture in unique(run.mixture for run in runs.runs):
        folder = records.record_dir(records_dir, DATA_PLAN, mixture)
        if (folder / "record.json").exists():
            record = records.read(folder)
            if isinstance(record, DataRecord):
                return record
    return None


def bytes_per_token(record: DataRecord) -> float:
    """Bytes of training text that a token stands for, the domains in the shares that training draws them in.

    Raises:
        UserError: a domain or field is missing.
    """
    try:
        return sum(
            record.config["domains"][domain]["weight"] * values["train"]["text_bytes"] / values["train"]["tokens"]
            for domain, values in record.results["domains"].items()
        )
    except KeyError as error:
        raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None


def data_composition(record: DataRecord) -> pd.DataFrame:
    """A row a domain of a data set.

    Args:
        record: its `results` are the data set's manifest, its `config` the mixture.

    Returns:
        Columns: domain, weight (share of each batch), documents, train_tokens, validation_tokens, removed
        (documents), contaminated (documents that share text with an evaluation item; among the removed).

    Raises:
        UserError: a domain or field is missing.
    """
    try:
        rows = [
            {
                "domain": domain,
                "weight": float(record.config["domains"][domain]["weight"]),
                "documents": values["train"]["documents"],
                "train_tokens": values["train"]["tokens"],
                "validation_tokens": values["validation"]["tokens"],
                "removed": sum(values["removed"].values()),
                "contaminated": values["removed"]["contaminated"],
            }
            for domain, values in record.results["domains"].items()
        ]
    except KeyError as error:
        raise UserError(f"{record.plan}/{record.run}/record.json: {error.args[0]}: missing") from None
    return pd.DataFrame(rows)
