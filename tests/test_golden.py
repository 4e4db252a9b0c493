"""The numbers have not changed: each recipe's loss curve is the stored one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fp8lab.config import RECIPES
from tests.golden.curves import FOLDER, STEPS, TORCH, read_curve, write_curves

# In one worker: the curves are computed once for all of them.
pytestmark = pytest.mark.xdist_group("golden")


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    write_curves(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_curve(computed, recipe) -> None:
    golden, losses = (np.array(read_curve(folder, recipe)) for folder in (FOLDER, computed))
    assert len(losses) == len(golden) == STEPS
    assert np.abs(losses - golden)[:10].max() < (1e-4 if torch.__version__.startswith(f"{TORCH}.") else 0.01)
    assert np.abs(losses - golden).max() < 0.02


def test_recipes_have_curves_of_their_own_and_all_learn() -> None:
    curves = [read_curve(FOLDER, recipe) for recipe in RECIPES]
    assert len({tuple(curve[1:]) for curve in curves}) == len(RECIPES)
    assert all(curve[-1] < curve[0] - 0.5 for curve in curves)
