"""The device to compute on, and copies to it."""

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError

CPU = torch.device("cpu")


def pick_device(device: str) -> str:
    """The device's name; auto is cuda if torch finds a GPU, else cpu."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device; use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to `device`, asynchronously from pinned memory on CUDA; float64 only to a CPU."""
    tensor = torch.from_numpy(array)
    if device.type != "cpu" and tensor.dtype == torch.float64:
        tensor = tensor.float()  # mps has no float64
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes fit in half of a GPU's free memory; False for a CPU."""
    return device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]
