"""Online evaluation on held-out train images: k-NN, online probe, collapse metrics."""

import time

import numpy as np
import torch
from torch import Tensor

from data.datasets import Dataset
from data.loader import Loader, generator
from data.transform import EvalTransform
from data.views import draw
from eval.collapse import NAMES, collapse_metrics, collapse_warnings
from eval.features import extract
from eval.knn import knn_top1
from training.method import Method

STREAM = 4  # of the seed; streams 1 and 2 are the loader's, 3 is the loop's
BANK, COLLAPSE_IMAGES = 20000, 2048  # images, at most
GRACE = 1000  # steps before the first collapse warning, or a tenth of the run if that is less


def held_out_order(count: int) -> tuple[np.ndarray, int]:
    """A fixed random order of `count` images; how many of its first (1 to 2,000) are held out."""
    return np.random.default_rng(0).permutation(count), max(1, min(count // 5, 2000))


class OnlineEval:
    """Metrics during pretraining; never on test images, so that no choice is made on those.

    data       a fifth of its labelled train images (at most 2,000) are the k-NN's queries, the
               others (at most 20,000) its bank
    loader     of pretraining: its views are used, and its images where none are labelled
    every      steps between evaluations, 0 for none
    total      steps of the run
    history    rows of metrics.jsonl, if the run is resumed
    warnings   collapse warnings so far, one for each metric, the oldest first
    """

    def __init__(
        self,
        data: Dataset,
        loader: Loader,
        transform: EvalTransform,
        processes,
        every: int,
        total: int,
        history: list[dict] = (),
    ) -> None:
        self.loader, self.transform, self.processes = loader, transform, processes
        self.every, self.total, self.seconds = every, total, 0.0
        self.history = [row for row in history if "std/representation" in row]
        self.warnings: list[str] = []
        labelled = data.train is not None and len(data.train) > 1
        images = data.train if labelled else loader.images
        order, self.queries = held_out_order(len(images))
        order = order[: self.queries + BANK]
        self.images = images.subset(order)
        self.labels = torch.from_numpy(data.train_labels[order]) if labelled else None

    def due(self, step) -> bool:
        """True after the first step, every `every` steps and after the last."""
        done = step.index + 1
        return self.every > 0 and (done == 1 or step.last or done % self.every == 0)

    def measure(self, method: Method, step: int) -> tuple[dict[str, float], list[str]]:
        """(metrics, new warnings) after `step`, the same on all ranks; sets `seconds`.

        Collapse metrics; except after the first step also knn_top1 and, with --online-probe,
        online_probe_top1, both in percent.
        """
        begun = time.perf_counter()
        metrics = self._accuracy(method) if step and self.labels is not None else {}
        outputs = self._outputs(method)
        metrics |= collapse_metrics(outputs)
        self.history.append({"step": step, **metrics})
        sizes = {name: x.shape[2] for name, x in outputs.items()}
        known = len(self.warnings)
        self.warnings = collapse_warnings(self.history, sizes, min(GRACE, self.total // 10))
        self.seconds = time.perf_counter() - begun
        return metrics, self.warnings[known:]

    def _accuracy(self, method: Method) -> dict[str, float]:
        n, labels = self.queries, self.labels
        features = extract(method.encoder, self.images, self.transform, self.processes)
        metrics = {"knn_top1": knn_top1(features[n:], labels[n:], features[:n], labels[:n])}
        if getattr(method, "probed", False):  # eval.probe.OnlineProbe
            with torch.no_grad():
                guess = method.probe(features[:n].to(self.processes.device)).argmax(1).cpu()
            metrics["online_probe_top1"] = 100 * (guess == labels[:n]).float().mean().item()
        return metrics

    @torch.no_grad()
    def _outputs(self, method: Method) -> dict[str, Tensor]:
        """The method's outputs in eval mode, on the same views each time: name -> (views, N, D)."""
        count = min(len(self.images), COLLAPSE_IMAGES)
        rng = generator(self.loader.seed, STREAM, 0)
        drawn = [draw(view, count, *self.images.shape, rng) for view in self.loader.views]
        was_training, blocks = method.training, []
        method.eval()
        for first in range(0, count, 256):
            rows = np.arange(first, min(first + 256, count))
            pixels = self.images.take(rows, self.processes.device)
            outputs = method.forward(*self.loader.make_views(pixels, drawn, rows))  # never compiled
            blocks.append({k: x.float().cpu() for k, x in outputs.items() if k in NAMES})
        method.train(was_training)
        return {name: torch.cat([block[name] for block in blocks], 1) for name in blocks[0]}
