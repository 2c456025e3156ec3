"""The table of GPUs and the driver's version."""

from pathlib import Path

import pytest
import torch

from hlbgpt.utils.errors import InputError
from hlbgpt.utils.hardware import GPUS, driver_version, gpu_named, gpu_of


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("A100-PCIE-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 3090", "RTX3090"),
        ("Tesla T4", "T4"),
        # Unknown, although much of the name is known.
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_gpus_by_their_device_names(
    device: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    found = gpu_of(torch.device("cuda"))
    assert (found.name if found else None) == name
    assert gpu_of(torch.device("cpu")) is None


def test_gpus_by_name() -> None:
    assert all(gpu_named(gpu.name.lower()) is gpu for gpu in GPUS)
    assert gpu_named("rtx 4090").name == "RTX4090"
    with pytest.raises(InputError, match=r"'H100' is known; use one of A100, .*H100-PCIe.* T4$"):
        gpu_named("H100")


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"#!/bin/sh\necho 580.1\necho 580.1\n")
    program.chmod(0o755)
    assert driver_version() == "580.1"
    program.write_bytes(b"#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert driver_version() is None
