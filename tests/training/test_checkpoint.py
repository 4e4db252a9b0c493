"""Checkpoints: damage is found and reported, the previous good one is used, and nothing good is overwritten."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.progress import LOCK_FILE_NAME, is_locked
from fp8lab.training import checkpoint, trainer
from fp8lab.training.checkpoint import (
    CHECKSUMS_FILE,
    CheckpointWriter,
    TrainingState,
    find_damage,
    load_model,
    save_final,
    write,
)
from tests import rule_data
from tests.checkpoints import load_latest, load_step
from tests.rule_data import tiny_config, tiny_model


def some_state(step: int) -> TrainingState:
    generator = torch.Generator().manual_seed(step)
    return TrainingState(
        step=step,
        model={"weight": torch.randn(16, 8, generator=generator)},
        optimizer={"weight.exp_avg": torch.randn(16, 8, generator=generator), "weight.step": torch.tensor(float(step))},
        trainer={"taken": torch.tensor(step)},
        metrics=pd.DataFrame({"step": range(step), "loss": [3.0] * step}),
        validation=pd.DataFrame({"step": [step]}),
        health=pd.DataFrame({"step": [step]}),
        facts={"wall_seconds": 1.5},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def delete_a_half(path: Path) -> None:
    """Remove the checkpoint's files but every second."""
    for other in sorted(path.parent.iterdir())[::2]:
        other.unlink()


DAMAGED_BY = {
    truncate: "truncated",
    flip_a_bit: "flipped in one bit",
    Path.unlink: "short of a file",
    delete_a_half: "half deleted",
}


def test_state_comes_back_bit_for_bit(tmp_path) -> None:
    state = some_state(5)
    write(tmp_path, state)
    loaded = load_latest(tmp_path)
    assert (loaded.step, loaded.facts) == (5, {"wall_seconds": 1.5})
    for part in ("model", "optimizer", "trainer"):
        expected, actual = getattr(state, part), getattr(loaded, part)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
    pd.testing.assert_frame_equal(loaded.metrics, state.metrics)


def test_no_checkpoint_is_a_fresh_start(tmp_path) -> None:
    assert load_latest(tmp_path) is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_lost_byte_or_lost_file_is_found(tmp_path, data) -> None:
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    path = write(folder, some_state(3))
    assert find_damage(path) is None
    victim = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(victim.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "truncate", "delete", "grow"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        # White space in a JSON file means nothing: flipping it may change nothing.
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        before = json.loads(victim.read_bytes()) if victim.suffix == ".json" else None
        victim.write_bytes(content)
        if victim.name == checkpoint.CHECKSUMS_FILE:
            try:
                if json.loads(bytes(content)) == before:
                    return
            except ValueError:
                pass
    elif kind == "truncate":
        victim.write_bytes(content[:place])
    elif kind == "grow":
        victim.write_bytes(content + b"}")
    else:
        victim.unlink()
    assert find_damage(path) is not None


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
def test_the_previous_good_checkpoint_is_used_and_the_damage_reported(
    tmp_path, caplog, damage, file, fault_report
) -> None:
    write(tmp_path, some_state(10))
    damage(write(tmp_path, some_state(20)) / file)
    with caplog.at_level(logging.WARNING):
        assert load_latest(tmp_path).step == 10
    assert len(caplog.records) == 1
    # A bit flipped in a checksum accuses the file that it is of.
    accused = "" if file == CHECKSUMS_FILE else file
    assert f"step-00000020/{accused}" in caplog.text
    fault_report(
        "damage",
        f"The newest checkpoint is {DAMAGED_BY[damage]}",
        "Its checksum finds it, a warning names the file, and the checkpoint before it is used",
        damaged_file=file,
        checkpoints=[10, 20],
        used=10,
    )


def test_with_none_left_the_error_is_clear_and_nothing_is_overwritten(tmp_path, monkeypatch, fault_report) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    trainer.train(tiny_config(), **folders)
    for path in (tmp_path / "checkpoints_dir").rglob("optimizer.safetensors"):
        flip_a_bit(path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"every checkpoint is damaged .*optimizer.safetensors"):
        trainer.train(tiny_config(), **folders)
    after = contents(tmp_path)
    lock = "checkpoints_dir/test/tiny/.lock"
    assert {name: content for name, content in after.items() if name != lock} == {
        name: content for name, content in before.items() if name != lock
    }
    fault_report(
        "damage",
        "Every checkpoint is damaged",
        "The run is refused with one line that names what is damaged, and no file is changed",
        recipe="bf16",
        files_unchanged=len(before) - 1,
    )


@pytest.mark.parametrize("recipe", ["bf16", "fused"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete_a_half])
def test_a_run_resumed_before_damage_ends_bit_identical(tmp_path, monkeypatch, damage, recipe, fault_report) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)
    folders = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    config = tiny_config(recipe=recipe)
    first = trainer.train(config, **folders)
    run = tmp_path / "checkpoints_dir" / "test" / "tiny"
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    damage(run / "step-00000020" / "model.safetensors")
    again = trainer.train(config, **folders)
    assert again.final == first.final
    assert (run / "model.safetensors").read_bytes() == weights
    assert find_damage(run / "step-00000020") is None
    fault_report(
        "damage",
        f"The newest checkpoint is {DAMAGED_BY[damage]}, and the run goes on",
        "It is done again from the checkpoint before, and ends bit-identical",
        recipe=recipe,
        resumed_from_step=10,
        steps=again.steps,
    )


def test_a_half_written_checkpoint_is_never_seen(tmp_path, fault_report) -> None:
    write(tmp_path, some_state(10))
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.tmp")
    assert load_latest(tmp_path).step == 10
    checkpoint.clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    fault_report(
        "writing",
        "A half-written checkpoint lies in the run's folder",
        "It has a temporary name, so it is never taken for one, and is removed when the run starts again",
    )


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_disk(tmp_path, monkeypatch, fault_report) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def logged_rename(source: Path, target: Path) -> Path:
        events.append(f"{source.name} -> {target.name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    final = write(tmp_path, some_state(7))
    named = events.index(f".{final.name}.tmp -> {final.name}")
    assert set(events[:named]) == {*(path.name for path in final.iterdir()), f".{final.name}.tmp"}
    assert events[named + 1 :] == [tmp_path.name]
    fault_report(
        "writing",
        "Power fails around the end of a write (each system call is watched)",
        "Every file and the folder are synced to disk before the checkpoint gets its name, and its parent after",
        files_synced_before=named - 1,
    )


def test_the_last_two_are_kept_and_those_asked_for(tmp_path, fault_report) -> None:
    writer = CheckpointWriter(tmp_path, keep_at={30, 70})
    for step in (10, 20, 30, 40, 50, 60, 70, 80):
        writer.save(some_state(step))
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{step}" for step in (30, 60, 70, 80)]
    fault_report(
        "writing",
        "Checkpoints pile up",
        "Those that the configuration names are kept, and of the others the last two",
        kept=[30, 60, 70, 80],
        written=8,
    )


def test_a_snapshot_is_of_the_moment_it_was_asked_for(tmp_path) -> None:
    state = some_state(1)
    expected = state.model["weight"].clone()
    writer = CheckpointWriter(tmp_path)
    writer.save(state)
    state.model["weight"].zero_()
    writer.wait()
    assert torch.equal(load_latest(tmp_path).model["weight"], expected)


def test_memory_of_the_last_snapshot_serves_the_next_whatever_its_shapes(tmp_path) -> None:
    writer = CheckpointWriter(tmp_path)
    states = [some_state(step) for step in (10, 20, 30)]
    states[2].model["weight"] = torch.arange(5.0)
    for state in states:
        writer.save(state)
    writer.wait()
    for state in states[1:]:
        assert torch.equal(load_step(tmp_path, state.step).model["weight"], state.model["weight"])


def test_a_failed_write_is_raised_and_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.save(some_state(10))
    writer.wait()

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer.save(some_state(20))
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert load_latest(tmp_path).step == 10


def fail_first_writes(monkeypatch, count: int) -> None:
    """Let there be no room on the disk for the first `count` checkpoints."""
    real, calls = checkpoint.write, []

    def write(*arguments):
        calls.append(1)
        if len(calls) <= count:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "write", write)


def test_after_a_failed_write_the_newer_state_is_tried_once(tmp_path, monkeypatch, caplog) -> None:
    fail_first_writes(monkeypatch, 1)
    writer = CheckpointWriter(tmp_path)
    writer.save(some_state(10))
    writer.save(some_state(20))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
    assert "No space left" in caplog.text
    writer.wait()


def test_a_second_failed_write_is_raised_at_once(tmp_path, monkeypatch) -> None:
    fail_first_writes(monkeypatch, 2)
    writer = CheckpointWriter(tmp_path)
    writer.save(some_state(10))
    with pytest.raises(OSError, match="No space left"):
        writer.save(some_state(20))
    writer.save(some_state(30))
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]


def test_a_checkpoint_to_keep_that_could_not_be_written_is_not_passed_over(tmp_path, monkeypatch) -> None:
    fail_first_writes(monkeypatch, 1)
    writer = CheckpointWriter(tmp_path, keep_at={10})
    writer.save(some_state(10))
    with pytest.raises(OSError, match="No space left"):
        writer.save(some_state(20))
    assert list(tmp_path.iterdir()) == []


def saved_model(folder: Path) -> GPT:
    folder.mkdir(exist_ok=True)
    model = GPT(tiny_model())
    model.initialise(1)
    save_final(folder, model, tiny_config())
    return model


def test_final_weights_load_as_they_were(tmp_path) -> None:
    model = saved_model(tmp_path)
    loaded, config = load_model(tmp_path)
    assert config == tiny_config()
    assert not loaded.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))


@pytest.mark.parametrize("trained_with", ["a" * 64, "b" * 64, None])
def test_weights_do_not_go_with_another_tokenizer(tmp_path, monkeypatch, trained_with) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_final(folder, GPT(tiny_model()), tiny_config(), trained_with)
    dataset = SimpleNamespace(folder=tmp_path / "data", tokenizer_sha256="a" * 64, encoding="the tokenizer")
    monkeypatch.setattr(checkpoint, "load_mixture", lambda name: name)
    monkeypatch.setattr(checkpoint.TokenDataset, "open", lambda *_: dataset)
    if trained_with == "b" * 64:
        with pytest.raises(UserError, match=r"trained with tokenizer bbbbbbbbbbbb, but .* now has aaaaaaaaaaaa"):
            checkpoint.trained_encoding(folder, tiny_config(), tmp_path)
    else:
        assert checkpoint.trained_encoding(folder, tiny_config(), tmp_path) == "the tokenizer"


def test_weights_of_another_model_are_refused_by_name(tmp_path) -> None:
    saved_model(tmp_path)
    other = tiny_config(model=tiny_model(d_model=64))
    (tmp_path / "config.json").write_text(other.model_dump_json())
    with pytest.raises(
        UserError, match=r"model.safetensors: embedding.weight has shape \(272, 32\); expected \(272, 64\)"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_final_files_are_refused_by_name(tmp_path, damage, file) -> None:
    saved_model(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=file) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_asking_whether_a_run_is_locked_keeps_no_process_from_training_it(tmp_path) -> None:
    """`fp8lab status` asks with a lock of its own, held here for longer than that takes."""
    path = tmp_path / LOCK_FILE_NAME
    path.touch()
    with path.open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (asking, fcntl.LOCK_UN)).start()
        with checkpoint.lock(tmp_path):
            assert is_locked(tmp_path)
