"""News of a run: written whole, at most once a second, readable or absent."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fp8lab import progress
from fp8lab.progress import Progress, ProgressFile, read_progress


def test_what_is_written_is_read(tmp_path) -> None:
    news = Progress(stage="training", step=3, steps=9, loss=2.5, tokens_per_second=1e6, bf16_mfu=0.4, eta_seconds=3725)
    ProgressFile(tmp_path).update(lambda: news, now=True)
    assert read_progress(tmp_path / "progress.json") == news
    assert news.summary() == "training 3/9, loss 2.5000, 1,000,000 tokens/s, BF16-MFU 40.0%, ETA 1:02:05"
    assert os.listdir(tmp_path) == ["progress.json"]


def test_news_within_a_second_is_dropped_unless_it_matters(tmp_path, monkeypatch) -> None:
    clock = iter([0.0, 0.0, 0.4, 0.9, 1.1, 1.1])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    file = ProgressFile(tmp_path)

    def step(number: int, *, now: bool = False) -> int:
        file.update(lambda: Progress(stage="training", step=number, steps=9), now=now)
        return read_progress(tmp_path / "progress.json").step

    assert step(1) == 1
    assert step(2) == 1
    assert step(3, now=True) == 3  # at 0.9
    assert step(4) == 3


def test_news_that_cannot_be_written_stops_nobody(tmp_path) -> None:
    file = ProgressFile(tmp_path / "gone")
    file.update(lambda: Progress(stage="training", steps=9), now=True)
    (tmp_path / "gone").mkdir()
    file.update(lambda: Progress(stage="training", step=2, steps=9), now=True)
    assert read_progress(tmp_path / "gone" / "progress.json").step == 2


@given(st.binary(max_size=200))
def test_a_file_that_is_no_news_is_none(content) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "progress.json")
        path.write_bytes(content)
        assert read_progress(path) is None
        assert read_progress(path.with_name("absent")) is None


def test_news_from_before_hosts_were_named_is_read(tmp_path) -> None:
    news = Progress(stage="training", step=3, steps=9)
    (tmp_path / "progress.json").write_text(news.model_dump_json(exclude={"host"}))
    read = read_progress(tmp_path / "progress.json")
    assert read == news
    assert read.is_here()


def test_alive_means_the_process_runs() -> None:
    assert Progress(stage="training", steps=1).is_alive()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not Progress(stage="training", steps=1, pid=process.pid).is_alive()
