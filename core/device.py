"""The device to compute on, and copies to it."""

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

CPU = torch.device("cpu")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # on other devices a run has one process


def pick_device(device: str) -> str:
    """The name of the device to use: cuda or cpu for "auto"; UserError if torch can't find it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in device:
        raise UserError(f"--device {device}: leave out the number; set CUDA_VISIBLE_DEVICES")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    names = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if device not in names:
        text = f"torch finds no such device here; use {' or '.join(names)}"
        raise UserError(f"--device {device}: {text}")
    return device


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels-last on CPU and CUDA, contiguous on other devices."""
    # on mps, batch norm's gradients were wrong in channels-last (pytorch/pytorch issue 175189)
    return torch.channels_last if device.type in BACKENDS else torch.contiguous_format


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to `device`, asynchronously from pinned memory on CUDA; float64 only to a CPU."""
    tensor = torch.from_numpy(array)
    if device.type != "cpu" and tensor.dtype == torch.float64:
        tensor = tensor.float()  # mps has no float64
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes fit in half of a CUDA GPU's free memory; False on other devices."""
    return device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]
