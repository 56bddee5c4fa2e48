"""Peak dense matrix throughput of devices: the denominator of MFU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from megallama.config.schema import Dtype
from megallama.host.dtypes import FLOATS

MEASURED = "measured matmul"
GIVEN = "log.peak_tflops"


@dataclass(frozen=True)
class Peak:
    """Peak of one device in one number format."""

    tflops: float
    """Dense matrix throughput in 1e12 FLOP/s, a multiply-add being 2."""
    source: str
    """The data sheet's device name, "log.peak_tflops" where that gives it, or "measured matmul" where neither does."""


@dataclass(frozen=True)
class _DataSheet:
    pattern: str
    """Words that must all be in torch's device name."""
    half_tflops: float
    """fp16 tensor cores, fp32 accumulation, dense (often printed with 2:4 sparsity: twice this)."""
    fp32_tflops: float
    """fp32 in the ordinary cores: torch does not use TF32 for matrix products unless told to."""
    has_bf16: bool = True


# First match wins, so the particular stands before the general. Numbers: NVIDIA's data sheet of each product.
_DATA_SHEETS = (
    _DataSheet("GB200", 2500.0, 80.0),  # GB200 NVL72: 5 PFLOP/s sparse a GPU
    _DataSheet("B200", 2250.0, 75.0),  # DGX B200: 4.5 PFLOP/s sparse a GPU
    _DataSheet("GH200", 989.4, 66.9),  # GH200: an H100 SXM die
    _DataSheet("H200 NVL", 835.5, 60.0),  # H200 data sheet: 1671 sparse
    _DataSheet("H200", 989.4, 66.9),  # H200 data sheet: 1979 sparse
    _DataSheet("H100 NVL", 835.5, 60.0),  # H100 data sheet: 1671 sparse
    _DataSheet("H100 PCIe", 756.0, 51.2),  # H100 PCIe product brief: 1513 sparse
    _DataSheet("H100", 989.4, 66.9),  # H100 SXM5, Hopper white paper: "H100 80GB HBM3"
    _DataSheet("H800 PCIe", 756.0, 51.2),  # as H100 PCIe: only fp64 and NVLink are reduced
    _DataSheet("H800", 989.4, 66.9),  # as H100 SXM
    _DataSheet("H20", 148.0, 44.0),  # H20: 148 dense
    _DataSheet("A100", 312.0, 19.5),  # A100 data sheet, SXM and PCIe alike
    _DataSheet("A800", 312.0, 19.5),  # as A100: only NVLink is reduced
    _DataSheet("A40", 149.7, 37.4),  # A40 data sheet
    _DataSheet("A30", 165.0, 10.3),  # A30 data sheet
    _DataSheet("A10", 125.0, 31.2),  # A10 data sheet
    _DataSheet("L40S", 362.05, 91.6),  # L40S data sheet: 733 sparse
    _DataSheet("L4", 121.0, 30.3),  # L4 data sheet: 242 sparse
    _DataSheet("RTX 5090", 209.5, 104.8),  # Blackwell RTX white paper: fp32 accumulation is half rate
    _DataSheet("RTX 4090", 165.2, 82.6),  # Ada white paper: fp32 accumulation is half rate
    _DataSheet("RTX 3090", 71.0, 35.6),  # GA102 white paper: fp32 accumulation is half rate
    _DataSheet("V100-PCIE", 112.0, 14.0, has_bf16=False),  # V100 data sheet
    _DataSheet("V100", 125.0, 15.7, has_bf16=False),  # V100 data sheet, SXM2
    _DataSheet("T4", 65.0, 8.1, has_bf16=False),  # T4 data sheet
)

_OTHER_CHIPS = {"Laptop", "Max-Q", "D", "MIG"}
"""Words that make the same name a smaller device: it is measured."""


def known_peak(device_name: str, *, dtype: Dtype) -> Peak | None:
    """The data sheet's peak of the device that torch calls `device_name`; None where there is none."""
    words = device_name.replace("-", " ").split()
    if _OTHER_CHIPS & {*words, *device_name.split()}:
        return None
    for sheet in _DATA_SHEETS:
        if not all(word in words for word in sheet.pattern.replace("-", " ").split()):
            continue
        if dtype == Dtype.fp64:
            return None
        if dtype == Dtype.fp32:
            return Peak(sheet.fp32_tflops, sheet.pattern)
        return Peak(sheet.half_tflops, sheet.pattern) if dtype == Dtype.fp16 or sheet.has_bf16 else None
    return None


def peak_of(device: torch.device, *, dtype: Dtype, given_tflops: float | None = None) -> Peak:
    """The peak of `device`: as given, else from its data sheet, else measured, which takes a moment."""
    if given_tflops is not None:
        return Peak(given_tflops, GIVEN)
    if device.type == "cuda":
        known = known_peak(torch.cuda.get_device_name(device), dtype=dtype)
        if known is not None:
            return known
    return measured_peak(device, dtype=dtype)


def measured_peak(device: torch.device, *, dtype: Dtype, seconds: float = 0.1) -> Peak:
    """The best throughput that a square matrix product reaches here, with this process's threads."""
    size, largest = (1024, 8192) if device.type == "cuda" else (128, 1024)
    best_s = _best_product_s(size, device=device, dtype=dtype, seconds=0.0)
    # The largest size is the fairest, but fp16 on a CPU may have no kernel worth the name.
    while size < largest and 8 * best_s < seconds:
        size *= 2
        best_s = _best_product_s(size, device=device, dtype=dtype, seconds=0.0)
    best_s = min(best_s, _best_product_s(size, device=device, dtype=dtype, seconds=seconds))
    return Peak(2.0 * size**3 / best_s / 1e12, MEASURED)


def _best_product_s(size: int, *, device: torch.device, dtype: Dtype, seconds: float) -> float:
    """Shortest time of a product of this size, in `seconds` of trying; at least two, to warm up."""
    a = torch.randn(size, size, device=device).to(FLOATS[dtype.full_name])
    b = torch.randn(size, size, device=device).to(FLOATS[dtype.full_name])
    out = torch.empty_like(a)
    times_s: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times_s) < 2 or time.perf_counter() < deadline:
        _wait(device)
        started = time.perf_counter()
        torch.matmul(a, b, out=out)
        _wait(device)
        times_s.append(time.perf_counter() - started)
    return min(times_s)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
