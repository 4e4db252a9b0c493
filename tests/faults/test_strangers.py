"""Opening what a stranger hands over executes nothing: a pickle in its place is refused and never loaded."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from fp8lab import records, trainer
from fp8lab.checkpoint import load_model, save_final, write
from fp8lab.config import load_plan, read_run_config
from fp8lab.data import load_mixture
from fp8lab.errors import UserError
from fp8lab.model import GPT
from tests import rule_data
from tests.checkpoints import load_latest
from tests.rule_data import tiny_config, tiny_model
from tests.test_checkpoint import some_state


class Payload:
    """Unpickling one makes a folder."""

    def __init__(self, mark: Path) -> None:
        self._mark = str(mark)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self._mark,)


def torch_pickle(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"embedding.weight": Payload(mark)}, buffer)
    return buffer.getvalue()


def plain_pickle(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark))


def yaml_object(mark: Path) -> bytes:
    return f"name: !!python/object/apply:os.mkdir ['{mark}']\n".encode()


@pytest.fixture
def mark(tmp_path):
    """Path that a payload makes a folder at, if anything executes it."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def test_the_payloads_would_work(tmp_path) -> None:
    for number, make in enumerate((plain_pickle, torch_pickle, yaml_object)):
        made = tmp_path / str(number)
        content = make(made)
        if make is plain_pickle:
            pickle.loads(content)
        elif make is torch_pickle:
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            yaml.unsafe_load(content)
        assert made.exists()


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_weights(tmp_path, mark, payload) -> None:
    model = GPT(tiny_model())
    save_final(tmp_path, model, tiny_config())
    (tmp_path / "model.safetensors").write_bytes(payload(mark))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "metrics.parquet", "state.json"])
def test_resume_state(tmp_path, mark, payload, file) -> None:
    path = write(tmp_path, some_state(1))
    (path / file).write_bytes(payload(mark))
    with pytest.raises(UserError, match=f"every checkpoint is damaged .*{file}"):
        load_latest(tmp_path)


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_records(tmp_path, mark, payload, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)
    places = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    trainer.train(tiny_config(tokens=128), **places)
    folder = places["records_dir"] / "test" / "tiny"
    for name in ("metrics", "validation"):
        (folder / f"{name}.parquet").write_bytes(payload(mark))
        with pytest.raises(UserError, match=rf"{name}\.parquet"):
            records.read_table(folder, name)
    (folder / "record.json").write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"record\.json"):
        records.read(folder)
    (folder / "eval.json").write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"eval\.json"):
        records.read_eval(folder)


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle, yaml_object])
@pytest.mark.parametrize("read", [load_plan, load_mixture, read_run_config])
def test_configurations(tmp_path, mark, payload, read) -> None:
    path = tmp_path / "stranger.yaml"
    path.write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"stranger\.yaml"):
        read(path)


def test_a_name_cannot_leave_its_folder(tmp_path) -> None:
    values = tiny_config().model_dump(mode="json") | {"run": "../../elsewhere"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="run: "):
        read_run_config(path)
