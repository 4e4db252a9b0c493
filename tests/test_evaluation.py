"""Scoring a run from its weights to ``eval.json``, as ``fp8lab evaluate`` does it."""

from __future__ import annotations

import ast
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from rich.console import Console

from fp8lab import evaluation, records
from fp8lab.config import RunConfig
from fp8lab.data import build, load_mixture
from fp8lab.errors import UserError
from fp8lab.export import export
from fp8lab.model import GPT
from fp8lab.provenance import collect_provenance
from fp8lab.running.plans import evaluate_run
from fp8lab.running.workspace import Workspace
from fp8lab.training import checkpoint
from tests.data.conftest import sentence, write_jsonl
from tests.evaluation_items import write_items
from tests.rule_data import tiny_config, tiny_model
from tests.test_cli import fp8lab

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """A run as training leaves it, with random weights."""

    config: RunConfig
    workspace: Workspace

    def folders(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.workspace.parameters().items()}

    def evaluate(self, suite: str = "demo", **options: Any) -> dict[str, Any]:
        return evaluation.evaluate(self.config, suite=suite, **self.folders() | options)

    def record(self) -> Path:
        return self.workspace.record(self.config)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("run")
    for split, documents in {"train": 60, "val": 20}.items():
        write_jsonl(root / "corpus" / f"{split}.jsonl", [sentence(f"{split}{n}") for n in range(documents)])
    source = {"kind": "jsonl", "train": ["train.jsonl"], "validation": ["val.jsonl"], "licence": "CC0"}
    mixture = {
        "name": "small",
        "description": "test",
        "tokenizer": {"vocab_size": 512},
        "decontaminate": False,
        "domains": {"prose": {"weight": 1.0, "source": source}},
    }
    (root / "small.yaml").write_text(yaml.safe_dump(mixture))
    build(load_mixture(str(root / "small.yaml")), root / "data", corpus_dir=root / "corpus", processes=1)
    config = tiny_config(
        model=tiny_model(vocab_size=528, seq_len=128), mixture=str(root / "small.yaml"), global_batch_tokens=512
    )
    workspace = Workspace(ROOT, root / "records", root / "data", root / "checkpoints")
    folder = workspace.work(config)
    folder.mkdir(parents=True)
    model = GPT(config.model)
    model.initialise(seed=1)
    checkpoint.save_final(folder, model, config)
    return Run(config, workspace)


def test_the_notebook_scores_a_run_into_its_record(run: Run) -> None:
    output = io.StringIO()
    done = evaluate_run(run.workspace.work(run.config), run.workspace, "demo", None, None, Console(file=output))
    assert done, (run.workspace.work(run.config) / "evaluate.log").read_text()
    result = records.read_eval(run.record())
    assert result["results"]["demo_choice"]["acc,none"] >= 0
    assert result["config"]["suite"] == "demo"
    notebook = nbformat.read(run.record() / "evaluate.ipynb", as_version=4)
    shown = "".join(
        output.get("data", {}).get("text/html", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    for task in result["results"]:
        assert task in shown


def test_scores_in_fp8_replace_neither_scores_nor_notebook_in_bf16(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = run.evaluate()
    (run.record() / "evaluate.ipynb").write_text("in BF16")
    options = [f"--{name.replace('_', '-')}={folder}" for name, folder in run.folders().items()]
    name = f"{run.config.plan}/{run.config.run}"
    assert fp8lab(monkeypatch, "evaluate", name, "--suite=demo", "--precision=tensorwise", *options) == 0
    assert records.read_eval(run.record()) == scores
    assert (run.record() / "evaluate.ipynb").read_text() == "in BF16"
    assert json.loads((run.record() / "eval-tensorwise.json").read_text())["config"]["precision"] == "tensorwise"
    notebook = run.record() / "eval-tensorwise" / "evaluate.ipynb"
    assert f"scored; see {notebook}\n" in capsys.readouterr().out
    assert "scored in tensorwise" in notebook.read_text()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--precision=fp9", ["fp9", "rowwise_with_gw_hp"]),
        ("--eval-data=/no/where", ["fp8lab: --eval-data: /no/where is no folder\n"]),
    ],
)
def test_a_precision_or_folder_that_does_not_exist_is_refused_before_any_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, says: list[str]
) -> None:
    monkeypatch.setattr("fp8lab.running.stage.Stage._start", lambda *_: pytest.fail("a kernel was started"))
    options = [f"--{name.replace('_', '-')}={folder}" for name, folder in run.folders().items()]
    assert fp8lab(monkeypatch, "evaluate", f"{run.config.plan}/{run.config.run}", option, *options) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in says)


def test_the_template_is_stored_without_outputs_and_takes_what_plans_pass() -> None:
    notebook = nbformat.read(ROOT / "runs" / "evaluate.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    parameters, *others = code
    assert parameters.metadata["tags"] == ["parameters"]
    assert not any("tags" in cell.metadata for cell in others)
    names = {target.id for line in ast.parse(parameters.source).body for target in line.targets}
    folders = {"records_dir", "data_dir", "checkpoints_dir"}
    assert names == folders | {"plan", "run", "mixture", "suite", "eval_data_dir", "precision"}


def test_scores_in_bf16_unless_asked_and_in_the_recipe_when_asked(run: Run) -> None:
    bf16, again = run.evaluate(), run.evaluate()
    assert bf16["results"] == again["results"]
    assert (bf16["config"]["precision"], bf16["config"]["emulated"]) == ("bf16", False)
    fp8 = run.evaluate(precision="tensorwise")
    assert run.evaluate(precision="bf16")["results"] == bf16["results"]
    assert fp8["config"]["precision"] == "tensorwise"
    assert fp8["config"]["emulated"] == (not torch.cuda.is_available())
    bits = [result["results"]["demo_perplexity"]["bits_per_byte,none"] for result in (bf16, fp8)]
    assert bits[0] != bits[1]
    assert bits[1] == pytest.approx(bits[0], rel=0.01)


def test_the_full_suite_needs_no_network(run: Run, tmp_path: Path) -> None:
    result = run.evaluate("full", eval_data_dir=write_items(tmp_path), limit=2)
    assert result == json.loads((run.record() / "eval.json").read_text())
    assert result["data"]["source"] == "files"
    assert len(result["data"]["tasks"]) == 11


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"suite": "hard"}, "suite: 'hard' does not exist; accepted: demo, full"),
        ({"precision": "fp9"}, "precision: 'fp9' does not exist; accepted: bf16, tensorwise"),
        ({"checkpoints_dir": Path("nowhere")}, "nowhere"),
        ({"data_dir": Path("nowhere")}, "nowhere"),
        ({"suite": "full", "eval_data_dir": Path("nowhere")}, "nowhere/wikitext/test.jsonl: no such file"),
    ],
)
def test_bad_input_is_refused_by_name(run: Run, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        run.evaluate(**options)
    assert "\n" not in str(refused.value)


def test_weights_of_another_tokenizer_are_refused(run: Run, tmp_path: Path) -> None:
    provenance = collect_provenance("CPU")
    provenance.tokenizer_sha256 = "0" * 64
    records.write(records.started(run.config, provenance, emulated=False), tmp_path)
    with pytest.raises(UserError, match="trained with tokenizer 000000000000, but"):
        run.evaluate(records_dir=tmp_path)


def test_export_reads_the_run_and_its_tokenizer(run: Run, tmp_path: Path) -> None:
    export(run.workspace.work(run.config), tmp_path / "out", data_dir=run.workspace.data)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
