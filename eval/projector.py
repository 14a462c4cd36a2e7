"""Train images in TensorBoard's projector, with their features, classes and thumbnails."""

import numpy as np
import torch

from data.transform import frame
from eval.features import extract
from eval.online import OnlineEval


def show(session, online: OnlineEval, class_names: list[str], count: int = 1000) -> None:
    """Write the first `count` images of the online evaluation, with features of the encoder now.

    session   a Session whose folder is open
    """
    rows = np.arange(min(count, len(online.images)))
    images, names = online.images.subset(rows), []
    if online.labels is not None:
        names = [class_names[label] for label in online.labels[rows].tolist()]
    features = extract(session.method.encoder, images, online.transform, session.processes)
    thumbnails = [frame(images.gather(part), 32, 32) for part in np.array_split(rows, 10)]
    if session.folder.board is not None:
        session.folder.board.embed(session.total - 1, features, names, torch.cat(thumbnails))
