"""Feature extraction: an encoder's outputs in eval mode, float32, on the CPU."""

import torch
from torch import Tensor, nn

from data.images import Images
from data.transform import EvalTransform
from training.distributed import SINGLE, Processes, sum_over_ranks

BATCH = 256  # images


@torch.no_grad()
def extract(
    encoder: nn.Module, images: Images, transform: EvalTransform, processes: Processes = SINGLE
) -> Tensor:
    """The encoder's output for each image in order, in eval mode: (N, feature_size).

    Each rank computes every world_size-th batch; its other rows are 0, so the sum has all.
    """
    was_training, device = encoder.training, processes.device
    encoder.eval()
    features = torch.zeros(len(images), encoder.feature_size, device=device)
    batches = torch.arange(len(images)).split(BATCH)
    for rows in batches[processes.rank :: processes.world_size]:
        x = transform(images.take(rows.numpy(), device))
        # with an index tensor instead of a slice, the CPU would wait for CUDA
        features[rows[0] : rows[-1] + 1] = encoder(x).float()
    encoder.train(was_training)
    return sum_over_ranks(features).cpu()
