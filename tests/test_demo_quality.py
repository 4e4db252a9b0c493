"""The demo's models have learned the language, not counts or licence headers.

They are held against count models fitted on the very tokens that they trained on, on validation text from
packages that neither has seen.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from fp8lab.config import RunConfig, parameter_count
from fp8lab.data import Loader, TokenDataset, load_mixture
from fp8lab.plan import load_plan
from tests.conftest import ROOT, DemoRuns
from tests.ngram import CountModel

PLAN = load_plan(ROOT / "runs" / "plans" / "demo.yaml")


@pytest.fixture(scope="module")
def dataset(demo_runs: DemoRuns) -> TokenDataset:
    return TokenDataset.open(load_mixture("demo"), demo_runs.data_dir)


def training_windows(config: RunConfig, dataset: TokenDataset) -> np.ndarray:
    seq_len = config.model.seq_len
    rows = config.global_batch_tokens // seq_len
    loader = Loader(dataset, seq_len=seq_len, seed=config.seed, global_batch_sequences=rows)
    return np.concatenate([loader.batch(step) for step in range(config.steps)])


def weighted(config: RunConfig, dataset: TokenDataset, loss) -> float:
    """`loss` of the validation windows that the run was validated on, by the mixture's weights."""
    return sum(
        weight * loss(dataset.validation_windows(domain, config.model.seq_len, config.validation_tokens)[0])
        for domain, weight in dataset.weights.items()
    )


@pytest.mark.parametrize("run", [config.run for config in PLAN.runs])
def test_every_run_beats_the_unigram_model_by_a_nat(demo_runs, dataset, run) -> None:
    config = demo_runs.plan[run]
    counts = CountModel(training_windows(config, dataset), config.model.vocab_size)
    unigram = weighted(config, dataset, counts.unigram_loss)
    assert demo_runs.record(config).final.validation_loss < unigram - 1


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise"])
def test_the_largest_size_beats_the_interpolated_bigram_model(demo_runs, dataset, recipe) -> None:
    config = max(
        (config for config in PLAN.runs if config.recipe == recipe), key=lambda config: parameter_count(config.model)
    )
    counts = CountModel(training_windows(config, dataset), config.model.vocab_size)
    bigram = weighted(config, dataset, counts.bigram_loss)
    assert demo_runs.record(config).final.validation_loss < bigram


def test_in_each_recipe_the_loss_falls_with_size(demo_runs) -> None:
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for config in demo_runs.plan.runs:
        record = demo_runs.record(config)
        losses[config.recipe].append((record.parameters.total, record.final.validation_loss))
    assert [len(losses[recipe]) for recipe in ("bf16", "tensorwise")] == [3, 3]
    for recipe, points in losses.items():
        by_size = [loss for _, loss in sorted(points)]
        assert by_size == sorted(by_size, reverse=True), recipe
    sizes = sorted(size for size, _ in losses["bf16"])
    assert sizes[-1] >= 4 * sizes[0]


def test_a_pair_of_recipes_sees_the_same_tokens_in_the_same_order(demo_runs, dataset) -> None:
    bf16, fp8 = (demo_runs.plan[f"65K-{recipe}-s1"] for recipe in ("bf16", "tensorwise"))
    assert training_windows(bf16, dataset).tobytes() == training_windows(fp8, dataset).tobytes()
    records = [demo_runs.record(config).provenance for config in (bf16, fp8)]
    assert records[0].data_sha256 == records[1].data_sha256 == dataset.sha256
