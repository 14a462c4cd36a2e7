"""TensorBoard: metrics in groups, settings, and a picture of views."""

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

GROUPS = {  # of scalars in TensorBoard; all others are in "loss"
    "lr": "schedule",
    "tau": "schedule",
    "images_per_second": "speed",
    "knn_top1": "accuracy",
    "online_probe_top1": "accuracy",
    "train_top1": "accuracy",
}


def tag(name: str) -> str:
    """A metric's name in TensorBoard: lr -> schedule/lr, std/y -> collapse/std y."""
    if "/" in name:
        return "collapse/" + name.replace("/", " ")
    return f"{GROUPS.get(name, 'loss')}/{name}"


class TensorBoard(SummaryWriter):
    """Writer of the events in `out`; a resume hides older events of steps from `start` on."""

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
