"""Count the kernels and copies of a step on a GPU, without a GPU: the step runs on fake tensors.

Eager PyTorch needs about 5 microseconds to start a kernel, so on a GPU the count decides how fast
a small network trains.
"""

from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operations that allocate memory or read metadata, and start no kernel
FREE = {"device", "empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Context that counts the operations on `device`.

    kernels   name -> count; views and metadata are left out
    foreach   the same for operations over lists of tensors, which start one kernel or more each
    copies    between host and device
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.kernels, self.foreach, self.copies = device, Counter(), Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name, tensors = function.overloadpacket.__name__, tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in tensors if isinstance(x, torch.Tensor)}
        if self.device not in devices or name in FREE or function.is_view:
            return result
        if name.startswith("_foreach"):
            self.foreach[name] += 1
        elif name in ("_to_copy", "copy_") and "cpu" in devices:
            self.copies += 1
        else:
            self.kernels[name] += 1
        return result


def count_launches(work: Callable[[], object], launches: Launches) -> None:
    """Count what `work` starts on a device, which need not exist; its data must be on the CPU."""
    no_pinning = mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), no_pinning, launches:
        work()
