"""Features: the encoder in eval mode on the evaluation transform, in float32."""

import numpy as np
import torch
from torch import Tensor, nn

from data.images import Images
from data.transform import EvalTransform
from training.distributed import SINGLE, Processes, sum_over_ranks


@torch.no_grad()
def extract(
    encoder: nn.Module,
    images: Images,
    transform: EvalTransform,
    processes: Processes = SINGLE,
    batch_size: int = 256,
) -> Tensor:
    """The encoder's output for every image, in order: (N, feature_size) float32, on the CPU.

    Each rank computes blocks of its own; the sum puts them together without padding.
    """
    was_training, device = encoder.training, processes.device
    encoder.eval()
    features = torch.zeros(len(images), encoder.feature_size, device=device)
    for block in range(processes.rank, -(-len(images) // batch_size), processes.world_size):
        rows = np.arange(block * batch_size, min((block + 1) * batch_size, len(images)))
        x = transform(images.gather(rows, device))
        features[rows[0] : rows[-1] + 1] = encoder(x).float()
    encoder.train(was_training)
    return sum_over_ranks(features).cpu()
