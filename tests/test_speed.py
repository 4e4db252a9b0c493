"""A speed plan runs from end to end, where it says so on a CPU, and its record reads back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from fp8lab import cli, provenance, records, speed
from fp8lab.config import FusedConfig, ModelConfig
from fp8lab.errors import UserError
from fp8lab.model import GPT
from fp8lab.speed import batches, breakdown, contestants
from fp8lab.speed.case import Measurement

TINY = {"name": "tiny", "d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 96, "vocab_size": 128, "seq_len": 32}
PLAN = {
    "name": "speed-test",
    "description": "A dry run",
    "rounds": 2,
    "steps_per_round": 2,
    "warmup_steps": 3,
    "compile": False,
    "cases": [
        {
            "model": TINY,
            "micro_batch": 2,
            "contestants": [
                {"recipe": "bf16"},
                {"recipe": "fused"},
                {"recipe": "fused", "head": "fp8"},
                {"recipe": "tensorwise_fast"},
            ],
        },
        {"model": TINY, "seq_len": 16, "micro_batch": 2, "contestants": [{"recipe": "bf16"}]},
    ],
}


def write_plan(folder: Path, **changes: object) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


def measure(path: Path, folder: Path, **options: object) -> records.SpeedRecord:
    plan = speed.load_speed_plan(path)
    options = {"on_case": lambda *_: None} | options
    return speed.measure(plan, records_dir=folder, data_dir=folder, occasion="first", **options)


@pytest.mark.parametrize(
    ("cases", "named"),
    [
        ([*PLAN["cases"], PLAN["cases"][0] | {"contestants": [{"recipe": "tensorwise"}]}], "tiny-T32-B2"),
        ([PLAN["cases"][0] | {"contestants": [{"recipe": "bf16"}, {"recipe": "bf16"}]}], "bf16"),
    ],
)
def test_what_would_never_be_timed_for_its_name_is_refused(tmp_path, cases, named) -> None:
    with pytest.raises(UserError, match=f"{named} more than once"):
        speed.load_speed_plan(write_plan(tmp_path, cases=cases))


def test_a_process_that_dies_between_a_table_and_its_record_leaves_an_occasion_that_goes_on(
    tmp_path, monkeypatch
) -> None:
    path = write_plan(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(records, "write", die)
        with pytest.raises(KeyboardInterrupt):
            measure(path, tmp_path)
    record = measure(path, tmp_path)
    assert record.status == "finished"
    assert len(records.read_table(tmp_path / "speed-test" / "first", "steps")) == (4 + 1) * 2 * 2


def test_a_plan_becomes_a_record_with_every_timed_step(tmp_path) -> None:
    measure(write_plan(tmp_path), tmp_path)
    folder = tmp_path / "speed-test" / "first"
    record, steps = records.read(folder), records.read_table(folder, "steps")
    assert isinstance(record, records.SpeedRecord)
    assert record.status == "finished"
    assert record.results["emulated"] is True
    assert len(steps) == (4 + 1) * 2 * 2
    assert steps["step_ms"].gt(0).all()
    contestants = record.results["cases"]["tiny-T32-B2"]["contestants"]
    assert contestants["fused"]["fused"] == FusedConfig().model_dump(mode="json")
    assert contestants["bf16"]["fused"] is None
    # Contestants take turns within a round.
    first_case = steps[steps["seq_len"] == 32]
    turns = first_case.drop_duplicates(["round", "recipe", "head"])[["round", "recipe", "head"]].to_numpy().tolist()
    order = [["bf16", "bf16"], ["fused", "bf16"], ["fused", "fp8"], ["tensorwise_fast", "bf16"]]
    assert turns == [[turn, *contestant] for turn in range(2) for contestant in order]


def test_contestants_start_from_the_same_weights_and_batches(tmp_path) -> None:
    record = measure(write_plan(tmp_path), tmp_path)
    contestants = record.results["cases"]["tiny-T32-B2"]["contestants"]
    exact = contestants["bf16"]["warmup_losses"]
    assert len(exact) == 3
    for name in ("fused", "fused-head_fp8", "tensorwise_fast"):
        assert contestants[name]["warmup_losses"] == pytest.approx(exact, abs=0.05)
        assert contestants[name]["warmup_losses"] != exact


def test_variants_of_fused_change_what_their_names_say_and_nothing_else() -> None:
    weights = GPT(ModelConfig(**TINY))
    settings = {}
    for recipe in ("fused", "fused_precise", "fused_e5m2"):
        model, _ = contestants.build(weights, contestants.Contestant(recipe=recipe))
        assert model.fp8_state.settings == contestants.fused_settings(contestants.Contestant(recipe=recipe))
        settings[recipe] = model.fp8_state.settings
    assert settings["fused"] == FusedConfig()
    assert settings["fused_precise"] == FusedConfig(fast_accumulation=("output", "grad_input"))
    assert settings["fused_e5m2"] == FusedConfig(gradient_format="e5m2")


def test_a_budget_ends_a_plan_early_and_says_so(tmp_path) -> None:
    record = measure(write_plan(tmp_path, rounds=50), tmp_path, budget_seconds=1e-3)
    assert record.status == "interrupted"
    assert "budget" in (record.reason or "")


@pytest.mark.parametrize(("step_seconds", "count"), [(0.01, 20), (0.5, 2)])
def test_a_turn_of_short_steps_has_more_of_them(tmp_path, monkeypatch, step_seconds: float, count: int) -> None:
    settle = Measurement._settle

    def settled(*arguments: object) -> float:
        assert settle(*arguments) > 0
        return step_seconds

    monkeypatch.setattr(Measurement, "_settle", settled)
    measure(write_plan(tmp_path, seconds_per_turn=0.2), tmp_path, only=["tiny-T16-*"])
    steps = records.read_table(tmp_path / "speed-test" / "first", "steps")
    assert set(steps.groupby(["recipe", "head", "round"])["step"].agg("nunique")) == {count}


def test_an_occasion_goes_on_with_the_cases_that_are_missing(tmp_path, monkeypatch) -> None:
    path = write_plan(tmp_path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(path, tmp_path, on_case=die)
    one = records.read(tmp_path / "speed-test" / "first")
    assert list(one.results["cases"]) == ["tiny-T32-B2"]
    whole = measure(path, tmp_path)
    assert whole.status == "finished"
    assert list(whole.results["cases"]) == ["tiny-T32-B2", "tiny-T16-B2"]
    assert whole.results["cases"]["tiny-T32-B2"] == one.results["cases"]["tiny-T32-B2"], "measured once"
    steps = records.read_table(tmp_path / "speed-test" / "first", "steps")
    assert not steps.duplicated(["seq_len", "recipe", "head", "round", "step"]).any()
    assert len(steps) == (4 + 1) * 2 * 2
    with pytest.raises(UserError, match="another plan"):
        measure(write_plan(tmp_path, seed=2), tmp_path)
    monkeypatch.setattr(provenance, "_git_state", lambda: ("another", False))
    with pytest.raises(UserError, match=r"another git_commit \(.*, now another\)"):
        measure(write_plan(tmp_path), tmp_path)


def test_chosen_cases_are_measured_and_the_rest_later_in_the_same_occasion(tmp_path) -> None:
    path = write_plan(tmp_path)
    some = measure(path, tmp_path, only=["tiny-T16-*"])
    assert list(some.results["cases"]) == ["tiny-T16-B2"]
    assert (some.status, some.reason) == ("interrupted", "the other cases were not asked for")
    assert measure(path, tmp_path).status == "finished"
    with pytest.raises(UserError, match=r"'7B-\*' matches no case of speed-test; it has tiny-T32-B2, tiny-T16-B2"):
        measure(path, tmp_path, only=["7B-*"])


def test_a_measurement_that_dies_says_no_longer_that_it_runs(tmp_path, monkeypatch, capsys) -> None:
    """The whole command, its kernel killed while it is at the second case."""
    path = write_plan(tmp_path, cases=PLAN["cases"][::-1], rounds=20)
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "data", "checkpoints")]
    folder = tmp_path / "records" / "speed-test" / "first"

    def kill_after_the_first_case() -> None:
        deadline = time.monotonic() + 120
        while not (folder / "steps.parquet").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(
            json.loads((tmp_path / "checkpoints/speed-test/first/progress.json").read_text())["pid"], signal.SIGKILL
        )

    killer = threading.Thread(target=kill_after_the_first_case, daemon=True)
    killer.start()
    monkeypatch.setattr("sys.argv", ["fp8lab", "speed", str(path), "--occasion", "first", *folders])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    killer.join()
    assert stop.value.code == 1
    record = records.read(folder)
    assert record.status == "interrupted"
    assert "died" in (record.reason or "").lower()
    assert list(record.results["cases"]) == ["tiny-T16-B2"]
    assert "failed" in capsys.readouterr().out


def test_the_command_goes_through_the_notebook(tmp_path, monkeypatch, capsys) -> None:
    plan = write_plan(tmp_path, cases=PLAN["cases"][1:])
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("records", "data", "checkpoints")]
    monkeypatch.setattr("sys.argv", ["fp8lab", "speed", str(plan), "--occasion", "first", *folders])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    folder = tmp_path / "records" / "speed-test" / "first"
    record = records.read(folder)
    assert record.status == "finished"
    assert record.results["emulated"] is True
    assert (folder / "speed.ipynb").exists()
    out = capsys.readouterr().out
    assert "tiny-T16-B2: emulated" in out
    assert "tokens/s" not in out


def test_a_contestant_that_cannot_run_leaves_the_others(tmp_path) -> None:
    odd = TINY | {"d_ff": 100}  # no multiple of 16
    cases = [{"model": odd, "micro_batch": 2, "contestants": [{"recipe": "bf16"}, {"recipe": "fused"}]}]
    results = measure(write_plan(tmp_path, cases=cases), tmp_path).results["cases"]["tiny-T32-B2"]
    assert list(results["contestants"]) == ["bf16"]
    assert "whole blocks" in results["errors"]["fused"]["error"]


def test_a_case_reads_the_tokens_of_its_own_mixture(tmp_path, monkeypatch) -> None:
    opened = []

    class Dataset:
        def __init__(self, name: str) -> None:
            self.encoding = SimpleNamespace(n_vocab=64 if name == "small" else 50_000)
            self.sha256 = name * 4

    def open_dataset(mixture: str, _: Path) -> Dataset:
        opened.append(mixture)
        return Dataset(mixture)

    class Tokens:
        def __init__(self, dataset: Dataset, **_: object) -> None:
            self.vocabulary = dataset.encoding.n_vocab

        def batch(self, _: int) -> np.ndarray:
            return np.full((2, 33), self.vocabulary - 1)

    monkeypatch.setattr(batches, "load_mixture", lambda name: name)
    monkeypatch.setattr(batches.TokenDataset, "open", open_dataset)
    monkeypatch.setattr(batches, "Loader", Tokens)
    cases = [
        {"model": TINY, "micro_batch": 2, "contestants": [{"recipe": "bf16"}]},
        {"model": TINY, "micro_batch": 1, "mixture": "small", "contestants": [{"recipe": "bf16"}]},
    ]
    plan = speed.load_speed_plan(write_plan(tmp_path, mixture="large", cases=cases))
    batches_of, source = batches.batch_source(plan, tmp_path)
    assert opened == ["large", "small"]
    assert (batches_of(plan.cases[1])[0] == 63).all()
    random = batches_of(plan.cases[0])[0]
    assert random.max() < TINY["vocab_size"], "the large vocabulary does not fit"
    assert random.unique().numel() > 20
    assert "large" in source
    assert "small" in source


def test_turns_before_the_first_round_leave_no_rows(tmp_path) -> None:
    cases = PLAN["cases"][1:]
    measure(write_plan(tmp_path, cases=cases, heat_up_seconds=0.2), tmp_path)
    steps = records.read_table(tmp_path / "speed-test" / "first", "steps")
    assert steps[["round", "step"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


PEER = """
from torch import nn

def version():
    return "peer 1.2"

class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

def convert(model, recipe):
    assert recipe == "te_delayed"
    for block in model.blocks:
        down = block.mlp.down
        block.mlp.down = Doubled(down.in_features, down.out_features, bias=False)
        block.mlp.down.weight = down.weight
"""


def test_a_peer_is_loaded_only_when_a_plan_names_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(contestants, "PEERS_DIR", tmp_path)
    (tmp_path / "te_adapter.py").write_text(PEER)
    (tmp_path / "nanochat_adapter.py").write_text("raise SystemExit('loaded')")
    cases = [{"model": TINY, "micro_batch": 2, "contestants": [{"recipe": "bf16"}, {"recipe": "te_delayed"}]}]
    results = measure(write_plan(tmp_path, cases=cases), tmp_path).results["cases"]["tiny-T32-B2"]
    exact, peer = results["contestants"]["bf16"], results["contestants"]["te_delayed"]
    assert peer["warmup_losses"] != exact["warmup_losses"], "it runs the peer's blocks"
    assert peer["warmup_losses"] == pytest.approx(exact["warmup_losses"], abs=0.1), "on the same weights and batches"
    assert peer["fp8"] is True
    assert results["peers"] == {"te_delayed": "peer 1.2"}


@pytest.mark.parametrize("recipe", ["te_current", "nanochat"])
def test_a_peer_that_is_not_installed_says_what_it_needs(tmp_path, recipe, monkeypatch) -> None:
    monkeypatch.delenv("NANOCHAT", raising=False)
    cases = [{"model": TINY, "micro_batch": 2, "contestants": [{"recipe": "bf16"}, {"recipe": recipe}]}]
    results = measure(write_plan(tmp_path, cases=cases), tmp_path).results["cases"]["tiny-T32-B2"]
    assert list(results["contestants"]) == ["bf16"]
    needed = {"te_current": "Transformer Engine is not installed", "nanochat": "NANOCHAT: should name a checkout"}
    assert needed[recipe] in results["errors"][recipe]["error"]


LOADS_CUDNN = """
import os
here = os.path.dirname(os.path.dirname(__file__))
loaded = {line.split()[-1] for line in open("/proc/self/maps") if here in line}
raise OSError(f"cuDNN of {os.environ.get('CUDNN_HOME') or os.environ['CUDNN_PATH']}, loaded {sorted(loaded)}")
"""


@pytest.mark.parametrize("chosen", [None, "CUDNN_HOME", "CUDNN_PATH"])
def test_transformer_engine_finds_all_of_pytorchs_cudnn_loaded_unless_told_otherwise(
    tmp_path, monkeypatch, chosen
) -> None:
    cudnn, engine = tmp_path / "nvidia" / "cudnn", tmp_path / "transformer_engine"
    for package, text in ((cudnn, ""), (engine, LOADS_CUDNN)):
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
    # Any library does for one that PyTorch has not needed yet.
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split()[-1] for line in maps if re.search(r"/libm[-.].*so", line)}
    (cudnn / "lib").mkdir()
    library = Path(shutil.copy(mapped.pop(), cudnn / "lib" / "libcudnn_cnn.so.9"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("CUDNN_HOME", "CUDNN_PATH"):
        monkeypatch.setenv(name, "/theirs")  # what the adapter sets is undone too
        if name != chosen:
            monkeypatch.delenv(name)
    loaded = f"cuDNN of {cudnn}, loaded {[str(library)]}" if chosen is None else "cuDNN of /theirs, loaded []"
    with pytest.raises(UserError, match=re.escape(loaded) + "$"):
        contestants.load_peer("te_current").convert(GPT(ModelConfig(**TINY)), "te_current")


def test_nanochats_linear_is_taken_from_a_checkout(tmp_path, monkeypatch) -> None:
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "fp8.py").write_text(
        "def convert_to_float8_training(module):\n    module.converted = True\n"
    )
    (tmp_path / "COMMIT").write_text("abc123\n")
    monkeypatch.setenv("NANOCHAT", str(tmp_path))
    peer = contestants.load_peer("nanochat")
    assert peer.version() == "nanochat abc123"
    model = GPT(ModelConfig(**TINY))
    peer.convert(model, "nanochat")
    assert model.blocks.converted
    assert not hasattr(model, "converted"), "the head is not its business"


@pytest.mark.parametrize("plan", sorted(Path("runs/plans").glob("speed-*.yaml")), ids=lambda path: path.stem)
def test_the_committed_plans_can_run(plan) -> None:
    loaded = speed.load_speed_plan(plan)
    assert loaded.name == plan.stem
    for case in loaded.cases:
        assert case.contestants[0].name == "bf16", "ratios are to BF16"
        assert len({contestant.name for contestant in case.contestants}) == len(case.contestants)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds"),
        ({"cases": [{"model": "2M", "micro_batch": 1, "contestants": [{"recipe": "bf16"}]}]}, "no model '2M'"),
        ({"cases": [{"model": "7M", "micro_batch": 1, "contestants": [{"recipe": "fp8"}]}]}, "recipe"),
        ({"warmups": 3}, "unknown field"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message) -> None:
    with pytest.raises(UserError, match=message):
        speed.load_speed_plan(write_plan(tmp_path, **change))


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", "gemm"),
        ("void cutlass::device_kernel<gemm>", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("triton_poi_fused_add_0", "casts and elementwise"),
        ("_swiglu_backward_kernel", "casts and elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memset (Device)", "other"),
    ],
)
def test_kernels_have_categories(kernel, category) -> None:
    assert breakdown.kernel_category(kernel) == category


def test_nanochats_version_is_its_own_commit_and_tells_of_local_edits(tmp_path, monkeypatch) -> None:
    def git(folder: Path, *command: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        run = subprocess.run(["git", *identity, "-C", folder, *command], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    def commit(folder: Path) -> str:
        git(folder, "init")
        git(folder, "add", ".")
        git(folder, "commit", "--allow-empty", "-m", "x")
        return git(folder, "rev-parse", "HEAD")

    checkout = tmp_path / "checkout"
    (checkout / "nanochat").mkdir(parents=True)
    (checkout / "nanochat" / "fp8.py").write_text("")
    monkeypatch.setenv("NANOCHAT", str(checkout))
    version = contestants.load_peer("nanochat").version
    commit(tmp_path)
    assert version() == "nanochat of unknown commit"
    own = commit(checkout)
    (checkout / "nanochat" / "__pycache__").mkdir()
    (checkout / "nanochat" / "__pycache__" / "fp8.pyc").write_text("")
    assert version() == f"nanochat {own}"
    (checkout / "nanochat" / "fp8.py").write_text("edited = True")
    assert version() == f"nanochat {own}-dirty"
