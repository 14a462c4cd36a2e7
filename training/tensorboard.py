"""What a run shows in TensorBoard: curves in groups, settings, views, the projector."""

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

GROUPS = {  # of TensorBoard's scalars; losses and what a method logs beside them are the rest
    "schedule": ("lr", "tau"),
    "speed": ("images_per_second",),
    "accuracy": ("knn_top1", "online_probe_top1", "train_top1"),
}


def tag(name: str) -> str:
    """A figure's name in TensorBoard, with its group: std/representation -> collapse/std ..."""
    if "/" in name:
        return "collapse/" + name.replace("/", " ")
    groups = (group for group, names in GROUPS.items() if name in names)
    return f"{next(groups, 'loss')}/{name}"


class TensorBoard:
    """The events of the run in `out`; those of steps from `start` on are hidden after a resume."""

    def __init__(self, out: Path, start: int) -> None:
        self.out, self.writer = out, SummaryWriter(str(out), purge_step=start or None)

    def scalars(self, row: dict) -> None:
        """A row of metrics.jsonl."""
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self.writer.add_scalar(tag(name), value, row["step"])

    def show(self, config: dict, views: Tensor) -> None:
        """The settings as a table, and a picture of views, (3, H, W) in 0..1."""
        rows = [(s, k, v) for s, table in config.items() for k, v in table.items()]
        lines = ["| table | key | value |", "|---|---|---|"]
        lines += [f"| {s} | {k} | {json.dumps(v)} |" for s, k, v in rows if s != "recipe"]
        self.writer.add_text("config", "\n".join(lines))
        self.writer.add_image("views", views)

    def embed(self, step: int, features: Tensor, names: list[str], images: Tensor) -> None:
        """In the projector, once: features (N, D) with class names and images (N, 3, s, s)."""
        if not (self.out / f"{step:05d}").exists():
            self.writer.add_embedding(features, names or None, images, step, "features")

    def close(self) -> None:
        self.writer.close()
