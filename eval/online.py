"""Online evaluation on held-out TRAIN images: k-NN, online probe, collapse metrics."""

import time

import numpy as np
import torch
from torch import Tensor

from data.datasets import Dataset
from data.loader import Loader, generator
from data.transform import EvalTransform
from data.views import draw
from eval.collapse import NAMES, collapse_alarms, collapse_figures
from eval.features import extract
from eval.knn import knn_top1
from training.method import Method

WATCH = 4  # stream of random numbers; the loader has 1 and 2, the loop 3
WATCHED = 2048  # images of the collapse metrics
GRACE = 1000  # steps, at most a tenth of the run, before a warning


def held_out_order(count: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """An order of `count` labelled images, and how many of its first are held out: a fifth."""
    return np.random.default_rng(seed).permutation(count), max(1, min(count // 5, 2000))


class OnlineEval:
    """Metrics during pretraining.  Never test images, so that watching selects nothing on them.

    data       a fifth of its labelled train images (2,000 at most) are the k-NN's queries, the
               others (20,000 at most) its bank
    loader     of the pretraining: its views; where no image is labelled, its images are watched
               for collapse
    every      steps between evaluations; 0 for none
    total      steps of the run
    history    the run's metrics so far, where it is resumed
    warnings   what looked like a collapse so far, in plain words, each once, in the order of time
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
        self.labels, watched = None, loader.images
        if data.train is not None and len(data.train) > 1:
            order, self.queries = held_out_order(len(data.train))
            order = order[: self.queries + 20000]
            self.images = data.train.subset(order)
            self.labels = torch.from_numpy(data.train_labels[order])
            watched = data.train
        self.watched = watched.subset(held_out_order(len(watched))[0][:WATCHED])

    def due(self, step) -> bool:
        """After the first step, every `every` steps and at the end."""
        last_of_cadence = self.every and (step.index + 1) % self.every == 0
        return bool(self.every) and (step.index == 0 or step.last or last_of_cadence)

    def measure(self, method: Method, step: int) -> tuple[dict[str, float], list[str]]:
        """(metrics, new warnings) after `step`; the same on all ranks.

        knn_top1, online_probe_top1 where a probe is trained (percent), and the collapse metrics:
        after the first step those alone, which later ones are compared with.  `seconds` then tells
        what it took.
        """
        begun = time.perf_counter()
        metrics = self._accuracy(method) if step and self.labels is not None else {}
        outputs = self._outputs(method)
        metrics |= collapse_figures(outputs)
        self.history.append({"step": step, **metrics})
        known = len(self.warnings)
        self.warnings = self._all_warnings({name: x.shape[2] for name, x in outputs.items()})
        self.seconds = time.perf_counter() - begun
        return metrics, self.warnings[known:]

    def _all_warnings(self, dimensions: dict[str, int]) -> list[str]:
        """Nothing of the first steps counts.

        dimensions   name of an output -> D
        """
        texts: dict[str, str] = {}
        first, *later = self.history
        if first["step"] == 0:
            for row in later:
                if row["step"] >= min(GRACE, self.total // 10):
                    for metric, text in collapse_alarms(row, first, dimensions).items():
                        texts.setdefault(metric, text)
        return list(texts.values())

    def _accuracy(self, method: Method) -> dict[str, float]:
        n, labels = self.queries, self.labels
        features = extract(method.encoder, self.images, self.transform, self.processes)
        metrics = {"knn_top1": knn_top1(features[n:], labels[n:], features[:n], labels[:n])}
        if hasattr(method, "probe"):
            with torch.no_grad():
                guess = method.probe(features[:n].to(self.processes.device)).argmax(1).cpu()
            metrics["online_probe_top1"] = 100 * (guess == labels[:n]).float().mean().item()
        return metrics

    @torch.no_grad()
    def _outputs(self, method: Method, block: int = 256) -> dict[str, Tensor]:
        """The method's outputs in eval mode on the same views each time: name -> (views, N, D).

        Each rank computes all of them: they are few.
        """
        count, rng = len(self.watched), generator(self.loader.seed, WATCH, 0)
        drawn = [draw(v, count, *self.watched.shape, rng) for v in self.loader.views]
        was_training, blocks = method.training, []
        method.eval()
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            pixels = self.watched.gather(np.arange(count)[rows], self.processes.device)
            views = self.loader.make_views(pixels, drawn, rows)
            blocks.append({k: x.float().cpu() for k, x in method(*views).items() if k in NAMES})
        method.train(was_training)
        return {name: torch.cat([b[name] for b in blocks], 1) for name in blocks[0]}
