"""Which device, which compute dtype, and how fast the pair could be at best."""

from __future__ import annotations

import functools
import socket
import time

import torch

from nanoray.errors import NanorayError, NoGpuError

# Dense peak of the tensor cores in FLOP/s at bf16, by a part of the device's name (vendors'
# data sheets, without sparsity). The first match wins: longer names stand before shorter ones.
_GPU_BF16_PEAK = (
    ("B200", 2.25e15),
    ("B100", 1.8e15),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("A6000", 155e12),
    ("RTX 5090", 209e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("MI300X", 1307e12),
    ("MI250X", 383e12),
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device() -> torch.device:
    """CUDA (this process's current device) if there is one, else MPS, else CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def reserved_device(on_gpu: bool) -> torch.device:
    """What a process on a cluster computes with: the GPU reserved for it, no other one.

    Args:
        on_gpu: a GPU, or a part of one, is reserved for it.

    Raises:
        NoGpuError: see `check_reserved_gpu`.
    """
    if on_gpu:
        check_reserved_gpu()
    device = pick_device()
    if device.type == "cuda" and not on_gpu:
        return torch.device("cpu")
    return device


def check_reserved_gpu() -> None:
    """Where a GPU is reserved for this process; takes no memory of any.

    Raises:
        NoGpuError: torch sees none. On the CPU the work would take days, not fail.
    """
    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        mend = "this torch is built without CUDA; install a build that has it"
    else:
        mend = (
            f"the NVIDIA driver is probably older than torch's CUDA {torch.version.cuda}, or the "
            f"node offers more GPUs than it has; `nvidia-smi` there tells both"
        )
    raise NoGpuError(
        f"a GPU is reserved for a process on {socket.gethostname()}, but torch "
        f"{torch.__version__} sees none: {mend}; or reserve none (--gpus-per-worker 0, "
        f"--rollout-gpus 0, --gpus-per-actor 0)"
    )


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matmuls in bf16 run on this device's own units (Ampere on; AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def pick_compute_dtype(device: torch.device, override: str = "auto") -> torch.dtype:
    """The dtype of matmuls and activations: bf16 where it is fast, else fp32.

    override: "auto", or the name of the dtype to use anyway. Raises NanorayError for others.
    """
    if override == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if override not in DTYPES:
        raise NanorayError(f"dtype must be auto, float32 or bfloat16, not {override!r}.")
    return DTYPES[override]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak matmul FLOP/s of the device: data sheet for GPUs, measured (once) elsewhere."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in _GPU_BF16_PEAK:
            if part.lower() in name.lower():
                # TF32 tensor cores do half of bf16, but only where fp32 matmuls may use them.
                tf32 = torch.backends.cuda.matmul.allow_tf32
                return peak if dtype == torch.bfloat16 else peak / (2 if tf32 else 16)
    return _measured_peak_flops(device, dtype)


@functools.cache
def _measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few square matmuls, about 0.2 s on a laptop."""
    size = 1024 if device.type == "cpu" else 4096
    a_MK = torch.randn(size, size, device=device).to(dtype)
    b_KN = torch.randn(size, size, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(8):
        _synchronize(device)
        start_s = time.perf_counter()
        a_MK @ b_KN
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
