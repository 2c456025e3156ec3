"""The device that a run uses: its name, memory and driver, and the peak figures of known GPUs."""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import torch

from hlbgpt.utils.errors import InputError


class GPU(NamedTuple):
    """A GPU's figures from its data sheet, for MFU and for plans."""

    name: str  # for `scripts/plan.py --gpu`
    pattern: str  # regular expression for its whole device name, without the maker
    flops: float  # peak of dense bf16 matrix products accumulated in fp32, FLOP/s
    fp32_flops: float  # peak of fp32 products without TF32, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes


# Sources: NVIDIA's data sheets of A100, H100, H200, L4 and T4 (figures "with sparsity" are halved)
# and the GA102 and Ada whitepapers for RTX 3090 and 4090. The T4 has no bf16; its figure is fp16.
# Patterns fit whole names because a laptop's 4090, an H100 NVL or a MIG slice is another GPU.
# Lightning's `get_available_flops` goes by parts of names: it takes an L40S for an L4, an RTX A4000
# for an A40 and a MIG slice for the whole GPU, so the MFU would be wrong without a word.
GPUS = (
    GPU("A100", r"A100-(SXM4|PCIE)-40GB", 312e12, 19.5e12, 1.555e12, 40e9),
    GPU("A100-80GB", r"A100-SXM4-80GB", 312e12, 19.5e12, 2.039e12, 80e9),
    GPU("A100-80GB-PCIe", r"A100 80GB PCIe", 312e12, 19.5e12, 1.935e12, 80e9),
    GPU("H100-SXM", r"H100 80GB HBM3", 989.4e12, 67e12, 3.35e12, 80e9),
    GPU("H100-PCIe", r"H100 PCIe", 756e12, 51e12, 2.0e12, 80e9),
    GPU("H200", r"H200", 989.4e12, 67e12, 4.8e12, 141e9),
    GPU("L4", r"L4", 121e12, 30.3e12, 300e9, 24e9),
    GPU("RTX4090", r"GeForce RTX 4090", 165.2e12, 82.6e12, 1008e9, 24e9),
    GPU("RTX3090", r"GeForce RTX 3090", 71e12, 35.6e12, 936e9, 24e9),
    GPU("T4", r"T4", 65e12, 8.1e12, 320e9, 16e9),
)


def gpu_of(device: torch.device) -> GPU | None:
    """The figures of `device`; None for a GPU that the table lacks, and for other devices."""
    if device.type != "cuda":
        return None
    name = re.sub(r"^(NVIDIA|Tesla) ", "", device_name(device))
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, name)), None)


def gpu_named(name: str) -> GPU:
    """The GPU of this name, ignoring case and separators; raises InputError for other names."""
    plain = re.sub(r"[ _-]", "", name).lower()
    for gpu in GPUS:
        if gpu.name.replace("-", "").lower() == plain:
            return gpu
    raise InputError(f"--gpu: no GPU {name!r} is known; use one of {gpu_names()}")


def gpu_names() -> str:
    """The names of the known GPUs, separated by commas."""
    return ", ".join(gpu.name for gpu in GPUS)


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU; for a CPU, its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes that a GPU's allocator gave out, or that this process took on a CPU.

    None for devices and systems that do not count them.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and os.name == "posix":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()  # one for each GPU
    return lines[0] if done.returncode == 0 and lines else None
