"""Each run at once has GPUs of its own while there are enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8lab.running.gpus import Share, shares, visible_gpus


@pytest.mark.parametrize(
    ("jobs", "processes", "gpus", "expected"),
    [
        (2, 1, "0123", [Share(("0",), 1), Share(("1",), 1)]),
        (2, 2, "0123", [Share(("0", "1"), 1), Share(("2", "3"), 1)]),
        (3, 1, "01", [Share(("0",), 2), Share(("1",), 1), Share(("0",), 2)]),
        (2, 2, "012", [Share(("0", "1"), 2)] * 2),
        (3, 1, "", [Share((), 3)] * 3),
        (2, 4, "01", [Share((), 2)] * 2),
    ],
)
def test_gpus_are_handed_out(jobs: int, processes: int, gpus: str, expected: list[Share]) -> None:
    assert shares(jobs, processes, list(gpus)) == expected


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 16))
def test_no_run_is_told_that_it_is_alone_when_it_is_not(jobs: int, processes: int, count: int) -> None:
    handed = shares(jobs, processes, [str(index) for index in range(count)])
    assert len(handed) == jobs
    for share in handed:
        assert share.runs == sum(set(share.gpus) == set(other.gpus) for other in handed)
        assert not share.gpus or len(share.gpus) == processes


@pytest.mark.parametrize(
    ("variable", "count", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("4,7", 2, ["4", "7"]),
        ("GPU-ab,GPU-cd", 2, ["GPU-ab", "GPU-cd"]),
        ("", 0, []),
        ("3,9", 1, ["3"]),
    ],
)
def test_gpus_are_named_as_the_environment_names_them(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, count: int, expected: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == expected
