"""Counts the kernels that our code would start on a GPU, without one, by torch's fake tensors.

Eager PyTorch needs about 5 microseconds to start a kernel, so on a GPU the count decides how fast
a small network trains.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# these give memory or tell what is in it
FREE = {"device", "empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Context that counts the operations on "cuda", without views.

    kernels   name -> count
    foreach   the same for operations over lists of tensors, which start one kernel or more each
    copies    between host and device
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.foreach, self.copies = Counter(), Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, tensors = function.overloadpacket.__name__, tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in tensors if isinstance(x, torch.Tensor)}
        if "cuda" not in devices or name in FREE or function.is_view:
            return result
        if name in ("_to_copy", "copy_") and "cpu" in devices:
            self.copies += 1
        elif name.startswith("_foreach"):
            self.foreach[name] += 1
        else:
            self.kernels[name] += 1
        return result


@contextlib.contextmanager
def count_launches() -> Iterator[Launches]:
    """Context in which "cuda" need not exist; counts what runs there, on data from the CPU."""
    no_pinning = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), no_pinning, Launches() as launches:
        yield launches
