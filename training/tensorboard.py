"""What a run shows in TensorBoard: curves in groups, settings, views."""

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

GROUPS = {  # of TensorBoard's scalars; all others are losses and what a method logs beside them
    "lr": "schedule",
    "tau": "schedule",
    "images_per_second": "speed",
    "knn_top1": "accuracy",
    "online_probe_top1": "accuracy",
    "train_top1": "accuracy",
}


def tag(name: str) -> str:
    """A metric's name in TensorBoard, with its group: std/representation -> collapse/std ..."""
    if "/" in name:
        return "collapse/" + name.replace("/", " ")
    return f"{GROUPS.get(name, 'loss')}/{name}"


class TensorBoard(SummaryWriter):
    """The events of the run in `out`; those of steps from `start` on are hidden after a resume."""

    def __init__(self, out: Path, start: int) -> None:
        super().__init__(str(out), purge_step=start or None)

    def scalars(self, row: dict) -> None:
        """Add a row of metrics.jsonl."""
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self.add_scalar(tag(name), value, row["step"])

    def show(self, config: dict, views: Tensor) -> None:
        """Add the settings as a table, and a picture of views, (3, H, W) in 0..1."""
        lines = ["| table | key | value |", "|---|---|---|"]
        for table, values in config.items():
            if table != "recipe":
                lines += [f"| {table} | {key} | {json.dumps(v)} |" for key, v in values.items()]
        self.add_text("config", "\n".join(lines))
        self.add_image("views", views)
