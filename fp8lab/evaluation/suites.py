"""Which tasks a suite has, and the task files that lm-eval reads.

lm-eval finds tasks as YAML files. For every suite we write a folder of small ones, each of which includes the
real definition, so prompts, metrics and versions stay lm-eval's own, and changes only where the items come from:

========  ==============================  =====================================
suite     definition                      items
========  ==============================  =====================================
demo      ours, beside this package       ours, and held-out text of the mixture
full      lm-eval's own                   the Hugging Face hub, or a folder
========  ==============================  =====================================

The folder holds, for each task of the full suite, ``<task>/<split>.jsonl`` in the schema of the hub's data set,
and for MMLU ``mmlu/<split>/<subject>.jsonl``. Where it lacks the split that the task normally scores, the
validation split is scored, under an alias that says so. All tasks are zero-shot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.tasks
import tiktoken
import yaml

import fp8lab.tasks
from fp8lab.data import TokenDataset
from fp8lab.errors import UserError

STOCK = Path(lm_eval.tasks.__file__).parent
OURS = Path(fp8lab.tasks.__file__).parent

FULL: dict[str, tuple[str, str]] = {
    "wikitext": ("wikitext/wikitext.yaml", "test"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "sciq": ("sciq/sciq.yaml", "test"),
    "boolq": ("super_glue/boolq/default.yaml", "validation"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "winogrande": ("winogrande/default.yaml", "validation"),
}
"""Task: lm-eval's definition, and the split that it scores. MMLU, a group of 57, comes on top."""

MMLU_FOLDER = "mmlu/default"
DEMO_PERPLEXITY = "demo_perplexity"
DEMO_ITEMS = ("demo_choice", "demo_boolean", "demo_physical")

HELD_OUT_WINDOW = 128
HELD_OUT_DOCUMENTS = 8
"""Held-out documents a domain that the demo scores."""
HELD_OUT_TOKENS = 65_536
"""Validation tokens a domain that they are taken from."""


@dataclass
class Suite:
    """Tasks ready for lm-eval."""

    names: list[str]
    """Tasks and groups, as `TaskManager.load` takes them."""
    folder: Path
    """Where the YAML files are."""
    source: str
    """Where the items come from: 'hub', 'files' or 'package'."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task: the split that is scored and, for files, the SHA-256 of each."""


def demo_suite(folder: Path, dataset: TokenDataset) -> Suite:
    """Our own items, and perplexity on the beginnings of held-out documents of `dataset`."""
    suite = Suite([], folder, "package")
    held_out = folder / f"{DEMO_PERPLEXITY}.jsonl"
    held_out.write_text("".join(json.dumps(item) + "\n" for item in held_out_documents(dataset)))
    _add_files(suite, DEMO_PERPLEXITY, OURS / f"{DEMO_PERPLEXITY}.yaml", {"test": held_out})
    for name in DEMO_ITEMS:
        _add_files(suite, name, OURS / f"{name}.yaml", {"test": OURS / f"{name}.jsonl"})
    return suite


def full_suite_from_hub(folder: Path) -> Suite:
    """The article's eleven tasks, downloaded by lm-eval."""
    suite = Suite([], folder, "hub")
    for name, (definition, split) in FULL.items():
        _add(suite, name, {"include": str(STOCK / definition)}, {"split": split})
    subjects = [path.stem for path in sorted((STOCK / MMLU_FOLDER).glob("mmlu_*.yaml"))]
    for name in subjects:
        _write_yaml(folder, name, {"include": str(STOCK / MMLU_FOLDER / f"{name}.yaml"), "num_fewshot": 0})
    _add_mmlu(suite, subjects, {"split": "test"})
    return suite


def full_suite_from_files(folder: Path, data_dir: Path) -> Suite:
    """The article's eleven tasks on the items in `data_dir`, with no network.

    Raises:
        UserError: a task's file is missing.
    """
    suite = Suite([], folder, "files")
    for name, (definition, split) in FULL.items():
        files = {path.stem: path for path in sorted((data_dir / name).glob("*.jsonl"))}
        if not {"test", "validation"} & files.keys():
            raise UserError(
                f"{data_dir / name / split}.jsonl: no such file; the full suite needs {', '.join(FULL)}, mmlu"
            )
        _add_files(suite, name, STOCK / definition, files, stock_split=split)
    tests = {path.stem: path for path in sorted((data_dir / "mmlu" / "test").glob("*.jsonl"))}
    if not tests:
        raise UserError(f"{data_dir / 'mmlu' / 'test'}: no .jsonl file of an MMLU subject in it")
    for subject, test in tests.items():
        definition_path = STOCK / MMLU_FOLDER / f"mmlu_{subject}.yaml"
        if not definition_path.exists():
            raise UserError(f"{test}: {subject!r} is no subject of MMLU")
        _write_yaml(folder, f"mmlu_{subject}", _local(definition_path, {"test": test}, suite))
    facts = {"split": "test", "subjects": len(tests), "sha256": {"test": _sha256(tests.values())}}
    _add_mmlu(suite, [f"mmlu_{subject}" for subject in tests], facts)
    return suite


def held_out_documents(dataset: TokenDataset) -> list[dict[str, str]]:
    """Beginnings of validation documents, the same number of each domain: [{'domain', 'text'}]."""
    documents = []
    for domain in dataset.weights:
        windows, _ = dataset.validation_windows(domain, HELD_OUT_WINDOW, HELD_OUT_TOKENS)
        tokens = windows[:, :-1].reshape(-1).tolist()
        for text in _documents(tokens, dataset.encoding)[:HELD_OUT_DOCUMENTS]:
            documents.append({"domain": domain, "text": text})
    return documents


def _documents(tokens: list[int], encoding: tiktoken.Encoding) -> list[str]:
    """Text between end-of-text tokens, each document cut to one window."""
    texts = []
    start = 0
    while start < len(tokens):
        end = next((at for at in range(start, len(tokens)) if tokens[at] == encoding.eot_token), len(tokens))
        # A cut may fall inside a character.
        text = encoding.decode_bytes(tokens[start : min(end, start + HELD_OUT_WINDOW)]).decode("utf-8", "ignore")
        if text.strip():
            texts.append(text)
        start = end + 1
    return texts


def _add_files(suite: Suite, name: str, definition: Path, files: Mapping[str, Path], stock_split: str = "test") -> None:
    config = _local(definition, files, suite)
    split = "test" if "test" in files else "validation"
    facts: dict[str, Any] = {"split": split, "sha256": {split: _sha256([files[split]])}}
    if split != stock_split:
        config["task_alias"] = f"{name} ({split} split)"
        facts["note"] = f"{split} split; the task's own is {stock_split}"
    _add(suite, name, config, facts)


def _local(definition: Path, files: Mapping[str, Path], suite: Suite) -> dict[str, Any]:
    """The definition, with its items from local JSON lines."""
    return {
        "include": str(definition),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path.absolute()) for split, path in files.items()},
            # Beside the task files, so that it goes when they go.
            "cache_dir": str(suite.folder / "cache"),
        },
        "training_split": "train" if "train" in files else None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
        "fewshot_split": None,
        "num_fewshot": 0,
    }


def _add(suite: Suite, name: str, config: Mapping[str, Any], facts: dict[str, Any]) -> None:
    _write_yaml(suite.folder, name, {"num_fewshot": 0, **config})
    suite.names.append(name)
    suite.data[name] = facts


def _add_mmlu(suite: Suite, subjects: list[str], facts: dict[str, Any]) -> None:
    group = {"include": str(STOCK / MMLU_FOLDER / "_mmlu.yaml"), "task": subjects}
    _write_yaml(suite.folder, "mmlu", group)
    suite.names.append("mmlu")
    suite.data["mmlu"] = facts


def _write_yaml(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))


def _sha256(paths: Iterable[Path]) -> str:
    """Hash of the files' concatenation, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
