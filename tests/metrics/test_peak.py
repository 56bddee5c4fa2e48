"""Peak throughput by device name, and measured."""

from __future__ import annotations

import pytest
import torch

from megallama.config.schema import Dtype
from megallama.metrics.peak import GIVEN, MEASURED, Peak, known_peak, measured_peak, peak_of


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", Dtype.bf16, 312.0),
        ("NVIDIA A100 80GB PCIe", Dtype.fp32, 19.5),
        ("NVIDIA A800-SXM4-80GB", Dtype.bf16, 312.0),
        ("NVIDIA H100 80GB HBM3", Dtype.bf16, 989.4),
        ("NVIDIA H100 PCIe", Dtype.bf16, 756.0),
        ("NVIDIA H100 NVL", Dtype.bf16, 835.5),
        ("NVIDIA H800", Dtype.fp16, 989.4),
        ("NVIDIA H20", Dtype.bf16, 148.0),
        ("NVIDIA H200", Dtype.bf16, 989.4),
        ("NVIDIA B200", Dtype.bf16, 2250.0),
        ("NVIDIA GB200", Dtype.bf16, 2500.0),
        ("NVIDIA L40S", Dtype.bf16, 362.05),
        ("NVIDIA GeForce RTX 4090", Dtype.bf16, 165.2),
        ("Tesla V100-SXM2-32GB", Dtype.fp16, 125.0),
        ("Tesla V100-PCIE-16GB", Dtype.fp16, 112.0),
    ],
)
def test_data_sheets(name: str, dtype: Dtype, tflops: float) -> None:
    peak = known_peak(name, dtype=dtype)
    assert peak is not None and peak.tflops == tflops


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Tesla V100-SXM2-32GB", Dtype.bf16),  # no bf16 in its tensor cores
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", Dtype.bf16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", Dtype.bf16),
        ("NVIDIA GeForce RTX 4090 D", Dtype.bf16),
        ("NVIDIA A1000", Dtype.bf16),  # its name begins like the A100's
        ("Some other GPU", Dtype.fp32),
    ],
)
def test_unknown_devices_are_left_to_measuring(name: str, dtype: Dtype) -> None:
    assert known_peak(name, dtype=dtype) is None


@pytest.mark.parametrize("dtype", list(Dtype))
def test_cpu_is_measured(dtype: Dtype) -> None:
    peak = peak_of(torch.device("cpu"), dtype=dtype)
    assert peak.source == MEASURED
    assert 1e-5 < peak.tflops < 1e3
    assert peak_of(torch.device("cpu"), dtype=dtype, given_tflops=3.5) == Peak(3.5, GIVEN)


def test_measured_peak_is_what_a_product_reaches() -> None:
    import time

    peak = measured_peak(torch.device("cpu"), dtype=Dtype.fp32)
    a = torch.randn(1024, 1024)
    best_s = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best_s = min(best_s, time.perf_counter() - started)
    # Wide, because the machine may be busy: a missing factor of 1000 or a wrong exponent is what it is for.
    assert 0.1 < peak.tflops * 1e12 * best_s / (2 * 1024**3) < 10
