"""The counter of kernels: each kind of operation once."""

import numpy as np
import torch
from kernel_count import count_launches


def test_it_counts_what_works_on_the_device():
    with count_launches() as launches:
        x = torch.from_numpy(np.ones((4, 3))).to("cuda")  # a copy
        y = torch.empty_like(x)  # memory
        z = x.view(12)[2:].reshape(2, 5).T  # views
        torch.mm(z, z.T)
        torch.add(x, 1, out=y)
        z.contiguous()
        torch._foreach_mul_([x, y], 2)
        torch.ones(3) + 1  # on the CPU
        y.mul_(2).cpu()  # a kernel and a copy

    assert launches.kernels == {"mm": 1, "add": 1, "clone": 1, "mul_": 1}
    assert launches.foreach == {"_foreach_mul_": 1} and launches.copies == 2
