"""Train images in TensorBoard's projector, with their features, classes and thumbnails."""

import numpy as np
import torch

from data.transform import frame
from eval.features import extract
from eval.online import OnlineEval


def show(session, online: OnlineEval, class_names: list[str], count: int = 1000) -> None:
    """The first `count` images of the online evaluation, by the encoder as it is now.

    session   a Session whose folder is open
    """
    images = online.images if online.labels is not None else online.watched
    images = images.subset(np.arange(min(count, len(images))))
    features = extract(session.method.encoder, images, online.transform, session.processes)
    labels = [] if online.labels is None else online.labels[: len(images)].tolist()
    blocks = np.array_split(np.arange(len(images)), 10)
    thumbnails = torch.cat([frame(images.gather(b), 32, 32) for b in blocks])
    if session.folder.board is not None:
        names = [class_names[i] for i in labels]
        session.folder.board.embed(session.total - 1, features, names, thumbnails)
