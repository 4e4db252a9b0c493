"""The roofline counts the bytes that the kernels' tensors have, and behaves as arithmetic must."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8lab import records
from fp8lab.analysis import roofline
from fp8lab.config import MODELS, FusedConfig
from fp8lab.errors import UserError
from fp8lab.flops import linear_weights
from fp8lab.kernels import reference
from fp8lab.kernels.scaling import Slot
from fp8lab.speed import load_speed_plan

ROWS, HEADS, HEAD_DIM, D_FF = 64, 2, 16, 96
D = HEADS * HEAD_DIM


def slot() -> Slot:
    return Slot(torch.ones(4), torch.zeros(4), torch.float8_e4m3fn)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def moved(inputs: list[Tensor | None], outputs: object) -> int:
    """Bytes of whole activations among what a kernel is given and returns, not of a number a row, or of angles."""
    tensors = [*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor) and tensor.numel() >= ROWS * D)


def measured_traffic() -> dict[str, int]:
    gain, rstd, angle = torch.ones(D), torch.ones(ROWS), torch.zeros(ROWS, HEAD_DIM // 2)
    x, branch, grad = bf16(ROWS, D), bf16(ROWS, D), bf16(ROWS, D)
    qkv, gate_up, grad_activated = bf16(ROWS, 3 * D), bf16(ROWS, 2 * D_FF), bf16(ROWS, D_FF)
    heads = [bf16(1, HEADS, ROWS, HEAD_DIM) for _ in range(3)]
    head_gain = torch.ones(HEAD_DIM)
    alone = reference.rms_norm(x, None, gain, 1e-6, slot())
    q_and_k = reference.norm_rotate(qkv, head_gain, head_gain, angle, angle, HEADS, 1e-6)
    backward = reference.rms_norm_backward(grad, x, rstd, gain, rstd, branch, slot(), slot(), True)
    return {
        "forward rms_norm": moved([x], alone[1:]),
        "forward norm_rotate": moved([qkv[:, : 2 * D]], q_and_k),
        "forward quantise": moved([x], reference.quantise(x, slot())),
        "forward rms_norm of the sum": moved([x, branch], reference.rms_norm(x, branch, gain, 1e-6, slot())),
        "forward swiglu": moved([gate_up], reference.swiglu(gate_up, slot())),
        "forward add": moved([x, branch], x + branch),
        "backward swiglu_backward": moved(
            [gate_up, grad_activated], reference.swiglu_backward(gate_up, grad_activated, slot(), slot())
        ),
        "backward rms_norm_backward of the MLP": moved([grad, x, branch], backward),
        "backward norm_rotate_backward": moved(
            [qkv, *heads],
            reference.norm_rotate_backward(qkv, tuple(heads), head_gain, head_gain, angle, angle, 1e-6, slot()),
        ),
        "backward rms_norm_backward of attention": moved([grad, x, branch], backward),
        "backward quantise_transposed": moved([x], reference.quantise_transposed(x, slot())),
        "backward norm_rotate": moved([qkv[:, : 2 * D]], q_and_k),
    }


def test_the_bytes_are_those_of_the_kernels_tensors(monkeypatch) -> None:
    monkeypatch.setattr(roofline, "RECOMPUTE_FROM", 1)
    monkeypatch.setattr(roofline, "FP8_OUTPUT_GRADIENT_FROM", 1)
    counted = {name: bytes_a_row * ROWS for name, bytes_a_row in roofline.fused_traffic(D, D_FF).items()}
    assert counted == measured_traffic()


def test_narrow_models_keep_what_they_do_not_compute_again() -> None:
    settings_ = FusedConfig()
    assert settings_.recompute_rotated_from == roofline.RECOMPUTE_FROM
    assert settings_.bf16_output_gradient_below == roofline.FP8_OUTPUT_GRADIENT_FROM
    narrow, wide = roofline.fused_traffic(512, 1408), roofline.fused_traffic(2048, 5632)
    assert "backward norm_rotate" in wide.keys() - narrow.keys()
    assert narrow["backward rms_norm_backward of the MLP"] == 10 * 512
    assert wide["backward rms_norm_backward of the MLP"] == 11 * 2048


def test_a_gemm_takes_its_flops_or_its_bytes() -> None:
    large = roofline.gemm_seconds(8192, 8192, 8192, "bf16", 2, 4e12)
    assert large == pytest.approx(2 * 8192**3 / roofline.GEMM_FLOPS["bf16"])
    thin = roofline.gemm_seconds(65536, 16, 16, "bf16", 2, 4e12)
    assert thin == pytest.approx(2 * (65536 * 16 + 16 * 16 + 65536 * 16) / 4e12)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 64), st.sampled_from(roofline.DEVICES))
def test_every_part_of_a_step_takes_time_and_fp8_shortens_only_the_gemms(name, sequences, device) -> None:
    model = MODELS[name]
    parts = {recipe: roofline.predict(model, sequences * 1024, recipe, device) for recipe in roofline.RECIPES}
    for recipe, part in parts.items():
        assert all(milliseconds > 0 for milliseconds in part.values()), recipe
        assert roofline.step_ms(model, sequences * 1024, recipe, device) == pytest.approx(sum(part.values()))
        for same in ("attention", "head", "optimizer"):
            assert part[same] == parts["bf16"][same]
    assert parts["fused"]["gemm"] == parts["tensorwise"]["gemm"] < parts["bf16"]["gemm"]
    assert parts["tensorwise"]["elementwise"] > parts["bf16"]["elementwise"]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(8, 64))
def test_casts_weigh_more_where_memory_is_slower(name, sequences) -> None:
    tokens = sequences * 1024
    faster, slower = (
        roofline.ratio(MODELS[name], tokens, "tensorwise", device) for device in (roofline.H200, roofline.H100)
    )
    assert slower < faster


def test_wide_models_gain_more() -> None:
    table = roofline.map_table(roofline.H100)
    for _, cells in table.groupby(["recipe", "tokens"]):
        assert cells.sort_values("width")["ratio"].is_monotonic_increasing


def test_devices_are_known_by_their_records_names() -> None:
    assert roofline.device_of("NVIDIA H100 80GB HBM3") is roofline.H100
    assert roofline.device_of("NVIDIA H200") is roofline.H200
    # Other memory or another power limit.
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H100 NVL"):
        assert roofline.device_of(name) is None


def test_the_maps_plan_times_the_models_that_are_predicted() -> None:
    plan = load_speed_plan(Path("runs/plans/speed-map.yaml"))
    timed = {(case.model.d_model, case.tokens): case.sized_model for case in plan.cases}
    assert timed == {
        (width, tokens): roofline.map_model(width) for width in roofline.MAP_WIDTHS for tokens in roofline.MAP_TOKENS
    }
    with pytest.raises(UserError, match="256, 512"):
        roofline.map_model(300)


MEASURED = {
    "1.5B-T2048-B16": ("1.5B", 2048, 16),
    "350M-T1024-B32": ("350M", 1024, 32),
    "125M-T1024-B64": ("125M", 1024, 64),
}
"""Cases of the record behind the constants: model, context, sequences."""


@pytest.mark.parametrize("case", MEASURED)
def test_the_constants_are_those_of_the_record_that_they_name(case) -> None:
    record = records.read(Path("runs/records", roofline.SOURCE))
    assert isinstance(record, records.SpeedRecord)
    assert roofline.device_of(record.provenance.device_name) is roofline.H200
    name, seq_len, sequences = MEASURED[case]
    model, tokens = MODELS[name].model_copy(update={"seq_len": seq_len}), seq_len * sequences
    results = record.results["cases"][case]
    measured = results["contestants"]["bf16"]
    assert roofline.step_ms(model, tokens, "bf16", roofline.H200) == pytest.approx(
        measured["step_ms_median"], rel=0.015
    )
    attention = roofline.predict(model, tokens, "bf16", roofline.H200)["attention"]
    assert attention == pytest.approx(measured["profile"]["ms_by_category"]["attention"], rel=0.015)


def test_the_gemms_of_the_record_are_a_little_faster_than_the_sustained_rate() -> None:
    record = records.read(Path("runs/records", roofline.SOURCE))
    assert isinstance(record, records.SpeedRecord)
    name, seq_len, sequences = MEASURED["1.5B-T2048-B16"]
    weights = sum(count for linear, count in linear_weights(MODELS[name]).items() if linear != "head")
    layers, gemms = MODELS[name].n_layers, record.results["cases"]["1.5B-T2048-B16"]["gemms"]
    for precision, rate in roofline.GEMM_FLOPS.items():
        block_ms = sum(
            times[f"{gemm}_{precision}"]
            for linear, times in gemms.items()
            if linear != "head"
            for gemm in ("forward", "grad_input", "grad_weight")
        )
        flops = 6 * seq_len * sequences * weights / layers
        assert flops / (block_ms * 1e-3) == pytest.approx(1.06 * rate, rel=0.01)


MEASURED_AS = {
    "forward rms_norm": "rms_norm, no branch",
    "forward norm_rotate": "norm_rotate",
    "forward quantise": "quantise",
    "forward rms_norm of the sum": "rms_norm",
    "forward swiglu": "swiglu",
    "backward swiglu_backward": "swiglu_backward",
    "backward rms_norm_backward of the MLP": "rms_norm_backward",
    "backward norm_rotate_backward": "norm_rotate_backward",
    "backward rms_norm_backward of attention": "rms_norm_backward",
    "backward quantise_transposed": "quantise_transposed",
    "backward norm_rotate": "norm_rotate",
}
"""What the kernels' benchmark calls the kernels that the roofline counts. The residual add is torch's."""


def test_the_kernels_share_of_bandwidth_is_what_their_benchmark_recorded() -> None:
    triton_ops = pytest.importorskip("fp8lab.kernels.triton_ops")
    record = records.read(Path("runs/records/benchmarks/kernels-NVIDIA-H200"))
    assert isinstance(record, records.BenchmarkRecord)
    rows = pd.DataFrame(record.results["rows"])
    tiles = [triton_ops.Tile(*tile) for tile in rows["tile"]]
    in_use = [tile == getattr(triton_ops, name) for tile, name in zip(tiles, rows["constant"], strict=True)]
    measured = rows[in_use].set_index(["size", "kernel"])[["bytes", "ms"]]
    shares = {}
    for size in record.results["sequences"]:
        model = MODELS[size]
        counted = [MEASURED_AS[name] for name in roofline.fused_traffic(model.d_model, model.d_ff) if "add" not in name]
        total = measured.loc[[(size, kernel) for kernel in counted]].sum()
        share = total["bytes"] / total["ms"] * 1e3 / record.results["copy_bytes_per_second"]
        shares[size] = share
    assert sum(shares.values()) / len(shares) == pytest.approx(roofline.WRITTEN_SHARE, abs=0.005)
    assert all(share == pytest.approx(roofline.WRITTEN_SHARE, abs=0.025) for share in shares.values()), shares
