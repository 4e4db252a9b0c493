"""Opening what a stranger hands over executes nothing.

A pickle in its place is refused and never loaded; what a record says is text to the reader's browser.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM

from fp8lab import export, records, tokenizer
from fp8lab.config import read_run_config
from fp8lab.data import TokenDataset, load_mixture
from fp8lab.data.cleaning import EvaluationItems
from fp8lab.data.shards import DomainManifest, Manifest, Removed, Shard, SplitManifest, TokenizerManifest
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.plan import load_plan
from fp8lab.progress import read_progress
from fp8lab.publish import execute_stale_chapters, notebook_filter, pandoc_edition, read_book
from fp8lab.speed import load_speed_plan
from fp8lab.training import checkpoint, trainer
from fp8lab.training.checkpoint import load_model, save_final, write
from tests import rule_data
from tests.checkpoints import load_latest, replace_file
from tests.fixtures import write_demo_records
from tests.projects import make_project
from tests.rule_data import tiny_config, tiny_model
from tests.small_gpt import make_encoding, make_model
from tests.training.test_checkpoint import some_state

RESUME_FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "trainer.safetensors",
    "metrics.parquet",
    "validation.parquet",
    "state.json",
)


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


@pytest.fixture
def refused(mark, fault_report) -> Callable[..., None]:
    """Say that files of a kind were refused and that nothing ran."""

    def report(what: str, payload: Callable[[Path], bytes], files: list[str]) -> None:
        assert not mark.exists()
        fault_report(
            "strangers",
            f"{what} from a stranger, with a payload that runs when unpickled or built by YAML",
            "It is refused, and nothing in it runs",
            payload=payload.__name__.replace("_", " "),
            files=files,
        )

    return report


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
def test_weights(tmp_path, mark, payload, refused) -> None:
    model = GPT(tiny_model())
    save_final(tmp_path, model, tiny_config())
    (tmp_path / "model.safetensors").write_bytes(payload(mark))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path)
    refused("Weights", payload, ["model.safetensors"])


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_exported_weights(tmp_path, mark, payload, refused) -> None:
    export.write(make_model(), make_encoding(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(payload(mark))
    # An exporter from before safetensors would have left its pickle here.
    (tmp_path / "pytorch_model.bin").write_bytes(payload(mark))
    with pytest.raises(SafetensorError):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    refused("An exported model", payload, ["model.safetensors", "pytorch_model.bin"])


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("file", [*RESUME_FILES, "checksums.json"])
def test_resume_state(tmp_path, mark, payload, file, refused) -> None:
    path = write(tmp_path, some_state(1))
    (path / file).write_bytes(payload(mark))
    with pytest.raises(UserError, match=f"every checkpoint is damaged .*{file}"):
        load_latest(tmp_path)
    refused("A checkpoint", payload, [file])


def resume(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read a run's newest whole checkpoint as the trainer does."""
    path = checkpoint.latest(folder)
    assert path is not None
    checkpoint.load_history(path)
    checkpoint.load_tensors(path, tensors)


def test_resume_state_that_is_whole(tmp_path) -> None:
    state = some_state(1)
    write(tmp_path, state)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in (state.model | state.optimizer).items()}
    resume(tmp_path, tensors)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in (state.model | state.optimizer).items())


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
@pytest.mark.parametrize("file", RESUME_FILES)
def test_resume_state_with_checksums_to_match(tmp_path, mark, payload, file, refused) -> None:
    path = write(tmp_path, some_state(1))
    replace_file(path, file, payload(mark))
    state = some_state(1)
    with pytest.raises((SafetensorError, ValueError, OSError, CheckpointException)):
        resume(tmp_path, state.model | state.optimizer | state.trainer)
    refused("A checkpoint whose checksums hold", payload, [file])


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_records(tmp_path, mark, payload, monkeypatch, refused) -> None:
    monkeypatch.setattr(trainer, "open_data", rule_data.open_data)
    places = {name: tmp_path / name for name in ("records_dir", "data_dir", "checkpoints_dir")}
    trainer.train(tiny_config(tokens=128), **places)
    folder = places["records_dir"] / "test" / "tiny"
    for name in records.COLUMNS:
        (folder / f"{name}.parquet").write_bytes(payload(mark))
        with pytest.raises(UserError, match=rf"{name}\.parquet"):
            records.read_table(folder, name)
    (folder / "record.json").write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"record\.json"):
        records.read(folder)
    (folder / "eval.json").write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"eval\.json"):
        records.read_eval(folder)
    tables = [f"{name}.parquet" for name in records.COLUMNS]
    refused("A run record", payload, ["record.json", "eval.json", *tables])


def test_a_table_with_a_pickled_type(tmp_path, mark, fault_report) -> None:
    # Arrow once unpickled the description of a column's type (CVE-2023-47248).
    types = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": plain_pickle(mark)}
    table = pa.table([pa.array([1])] * len(records.COLUMNS["metrics"]), names=list(records.COLUMNS["metrics"]))
    schema = pa.schema([field.with_metadata(types) for field in table.schema])
    pyarrow.parquet.write_table(table.cast(schema), tmp_path / "metrics.parquet")
    assert records.read_table(tmp_path, "metrics")["step"].tolist() == [1]
    fault_report(
        "strangers",
        "A table from a stranger whose column types are pickles (CVE-2023-47248)",
        "Its numbers are read, and nothing in it runs",
        files=["metrics.parquet"],
    )


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_token_shards(tmp_path, mark, payload, refused) -> None:
    mixture = load_mixture("demo")
    content = payload(mark)
    shard = Shard(file="prose-00000.bin", tokens=-(-len(content) // 2), sha256="0" * 64)
    split = SplitManifest(documents=1, tokens=shard.tokens, shards=(shard,))
    encoding = make_encoding()
    manifest = Manifest(
        mixture=mixture.name,
        content_sha256=mixture.content_sha256,
        tokenizer=TokenizerManifest(sha256=tokenizer.sha256(encoding), vocab_size=encoding.n_vocab),
        decontamination=None,
        domains={"prose": DomainManifest(source={}, removed=Removed(), train=split, validation=split)},
    )
    folder = tmp_path / mixture.name
    folder.mkdir()
    files = {
        shard.file: content + bytes(len(content) % 2),
        "tokenizer.tiktoken": tokenizer.ranks_text(encoding),
        "manifest.json": manifest.model_dump_json().encode(),
    }
    for name in files:
        # The others are whole; a shard is read only where its hash is the manifest's.
        for other, whole in files.items():
            (folder / other).write_bytes(whole)
        (folder / name).write_bytes(content + bytes(len(content) % 2))
        with pytest.raises(UserError, match=re.escape(name)):
            TokenDataset.open(mixture, tmp_path)
    refused("A data set of token shards", payload, list(files))


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_evaluation_items(tmp_path, mark, payload, refused) -> None:
    (tmp_path / "test.jsonl").write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"test\.jsonl"):
        EvaluationItems.read(tmp_path)
    refused("Evaluation items", payload, ["test.jsonl"])


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle])
def test_progress_of_another_process(tmp_path, mark, payload) -> None:
    (tmp_path / "progress.json").write_bytes(payload(mark))
    assert read_progress(tmp_path / "progress.json") is None


@pytest.mark.parametrize("payload", [plain_pickle, torch_pickle, yaml_object])
@pytest.mark.parametrize("read", [load_plan, load_speed_plan, load_mixture, read_run_config])
def test_configurations(tmp_path, mark, payload, read, refused) -> None:
    path = tmp_path / "stranger.yaml"
    path.write_bytes(payload(mark))
    with pytest.raises(UserError, match=r"stranger\.yaml"):
        read(path)
    kinds = {load_plan: "plan", load_speed_plan: "speed plan", load_mixture: "mixture", read_run_config: "run"}
    refused("A configuration", payload, [kinds[read]])


def test_a_name_cannot_leave_its_folder(tmp_path) -> None:
    values = tiny_config().model_dump(mode="json") | {"run": "../../elsewhere"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="run: "):
        read_run_config(path)


HOSTILE = (
    "~~~~~~\n</code></pre><i class=evil>",
    "{{< include /etc/passwd >}}",
    "<script>evil()</script>",
    "<img src=x onerror=evil()>",
    "[evil](javascript:evil())",
    "[evil]: javascript:evil()",
    "javascript:evil()",
    "![evil](http://evil.test/x.png)",
    "[evil]{onmouseover=evil()}",
    "`<i class=evil>`{=html}",
    "$\\href{javascript:evil()}{evil}$",
    "a\n\n```{=html}\n<i class=evil></i>\n```\n",
    "a\n\n::: {.evil onclick=evil()}\nb\n:::\n",
)
"""Texts that a page must not take for markup."""


def edit(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_in_the_names_of_a_record(tmp_path, text) -> None:
    changes: dict[str, Callable[[Any], None]] = {
        "provenance.device_name": lambda values: values["provenance"].update(device_name=text),
        "provenance.git_commit": lambda values: values["provenance"].update(git_commit=text),
        "provenance.epochs": lambda values: values["provenance"].update(epochs={text: 1.0}),
        "model.name": lambda values: values["model"].update(name=text),
        "conversion.shape": lambda values: values["conversion"][0].update(shape=text),
        "config.mixture": lambda values: values["config"].update(mixture=text),
    }
    write_demo_records(tmp_path)
    folder = next((tmp_path / "demo").iterdir())
    record = (folder / "record.json").read_text()
    for field, change in changes.items():
        (folder / "record.json").write_text(record)
        edit(folder / "record.json", change)
        with pytest.raises(UserError, match=rf"record\.json: {re.escape(field)}: .*markup") as error:
            records.read(folder)
        assert "\n" not in str(error.value)
    (folder / "eval.json").write_text(json.dumps({"results": {"task": {"alias": text}}}))
    with pytest.raises(UserError, match=r"eval\.json: results\.task\.alias: .*markup"):
        records.read_eval(folder)
    table = pd.read_parquet(folder / "health.parquet")
    table.assign(layer=text).to_parquet(folder / "health.parquet")
    with pytest.raises(UserError, match=r"health\.parquet: layer: .*markup"):
        records.read_table(folder, "health")


class _Elements(HTMLParser):
    """Tags and attributes of a page apart from its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [f"{name}={value}" for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_markup_in_the_free_text_of_records_is_shown_as_text(tmp_path, fault_report) -> None:
    text = " ".join(HOSTILE)
    records_dir = make_project(tmp_path)
    runs = sorted(records_dir.glob("demo/*/record.json"))
    for path in runs:
        edit(path, lambda values: values.update(samples=[text]))
    edit(runs[-1], lambda values: values.update(status="failed", final=None, reason=text))
    for path in records_dir.glob("benchmarks/data-*/record.json"):
        edit(path, lambda values: values["provenance"].update(command=text))
    report = {
        "topic": "disk",
        "fault": text,
        "outcome": text,
        "measured": {text: [text]},
        "test": text,
        "passed": False,
    }
    edit(records_dir / "reliability/fault-tests/record.json", lambda values: values["results"]["faults"].append(report))
    for path in records_dir.glob("speed-h200/*/record.json"):
        # The article quotes an error up to its colon.
        errors = {"rowwise": {"error": text.replace(":", " "), "traceback": text}}
        edit(path, lambda values: values["results"]["cases"]["1.5B-T2048-B16"].update(errors=errors))  # noqa: B023
    book = yaml.safe_load((tmp_path / "_quarto.yml").read_text())
    book["book"]["chapters"] = [f"chapters/{name}.ipynb" for name in ("reliability", "reproduce", "throughput")]
    (tmp_path / "_quarto.yml").write_text(yaml.safe_dump(book))
    execute_stale_chapters(tmp_path, records_dir)
    pandoc_edition.render(read_book(tmp_path), tmp_path / "site")
    for chapter in read_book(tmp_path).chapters:
        # Quarto replaces its shortcodes before it reads any other mark, in code too.
        assert "{{<" not in "".join(notebook_filter.prose(json.loads(chapter.executed.read_text())))
        page = _Elements((tmp_path / "site" / chapter.page).read_text())
        assert not page.tags & {"script", "i"}
        assert [attribute for attribute in page.attributes if "evil" in attribute or attribute.startswith("on")] == []
        assert "evil()" in page.text
        assert "{{< include /etc/passwd >}}" in page.text
    fault_report(
        "strangers",
        "A record whose messages and samples hold scripts, links, images and shortcodes",
        "Its pages show them as text",
        texts=len(HOSTILE),
    )
