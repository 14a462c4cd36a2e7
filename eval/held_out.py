"""Online evaluation on held-out TRAIN images: k-NN, online probe, collapse metrics."""

import time

import numpy as np
import torch
from torch import Tensor

from data.images import Images
from data.loader import Loader, generator
from data.views import draw, frame
from eval.collapse import NAMES, collapse_alarms, collapse_figures
from eval.features import extract
from eval.knn import knn_top1

WATCH = 4  # stream of random numbers; the loader has 1 and 2, the loop 3
WATCHED = 2048  # images of the collapse figures
GRACE = 1000  # steps, at most a tenth of the run, before an alarm


def held_out_order(count: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """An order of `count` labelled images, and how many of its first are held out: a fifth."""
    return np.random.default_rng(seed).permutation(count), max(1, min(count // 5, 2000))


def hold_out_labels(labels: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Pretraining's labels with those of the held-out images unknown (-1), for the online probe.

    The labelled images come first among the pretraining images, see `Dataset.pretraining`.
    """
    order, queries = held_out_order(len(train_labels))
    labels = labels.copy()
    labels[order[:queries]] = -1
    return labels


class HeldOut:
    """Figures during pretraining.  Never test images, so that watching selects nothing on them.

    images, labels   the labelled train images or None: a fifth (2,000 at most) are the k-NN's
                     queries, the others (20,000 at most) its bank
    loader           of the pretraining: views, mean and std; where no image is labelled, its images
                     are watched for collapse
    sizes            evaluation geometry, see `frame`
    before           the run's metrics so far, where it is resumed
    """

    def __init__(
        self, images: Images | None, labels, every: int, loader: Loader, sizes, before=()
    ) -> None:
        self.every, self.loader, self.sizes, self.seconds = every, loader, sizes, 0.0
        self.history = [row for row in before if "std/representation" in row]
        self.dimensions: dict[str, int] = {}
        self.labels, watched = None, loader.images
        if images is not None and len(images) > 1:
            order, self.queries = held_out_order(len(images))
            order = order[: self.queries + 20000]
            self.images, self.labels = images.subset(order), torch.from_numpy(labels[order])
            watched = images
        self.watched = watched.subset(held_out_order(len(watched))[0][:WATCHED])

    def due(self, step) -> bool:
        """After the first step, every `every` steps and at the end."""
        last_of_cadence = self.every and (step.index + 1) % self.every == 0
        return bool(self.every) and (step.index == 0 or step.last or last_of_cadence)

    def figures(self, method, processes, step: int) -> dict[str, float]:
        """knn_top1, online_probe_top1 where a probe is trained (percent), and collapse figures.

        The same on all ranks; `seconds` then tells what it took.  After the first step there are
        the collapse figures alone: what later ones are compared with.
        """
        begun = time.perf_counter()
        found = self._accuracy(method, processes) if step and self.labels is not None else {}
        outputs = self._outputs(method, processes)
        self.dimensions = {name: x.shape[2] for name, x in outputs.items()}
        found |= collapse_figures(outputs)
        self.history.append({"step": step, **found})
        self.seconds = time.perf_counter() - begun
        return found

    def embedding(self, method, processes, count: int = 1000) -> tuple[Tensor, list[int], Tensor]:
        """Features, labels and thumbnails of train images, for a projector; no labels: []."""
        images = self.images if self.labels is not None else self.watched
        images = images.subset(np.arange(min(count, len(images))))
        features = extract(
            method.encoder, images, self.loader.mean, self.loader.std, self.sizes, processes
        )
        labels = [] if self.labels is None else self.labels[: len(images)].tolist()
        blocks = np.array_split(np.arange(len(images)), 10)
        return features, labels, torch.cat([frame(images.gather(b), 32, 32) for b in blocks])

    def alarms(self, total: int) -> list[str]:
        """What looked like a collapse so far, in plain words, each once and in the order of time.

        Nothing of the first steps counts.
        """
        found: dict[str, str] = {}
        if self.history and self.history[0]["step"] == 0:
            late = [row for row in self.history if row["step"] >= min(GRACE, total // 10)]
            for row in late:
                new = collapse_alarms(row, self.history[0], self.dimensions)
                found = found | new | found  # in the order of time, with their first words
        return list(found.values())

    def _accuracy(self, method, processes) -> dict[str, float]:
        n, loader = self.queries, self.loader
        features = extract(
            method.encoder, self.images, loader.mean, loader.std, self.sizes, processes
        )
        found = {"knn_top1": knn_top1(features[n:], self.labels[n:], features[:n], self.labels[:n])}
        if hasattr(method, "probe"):
            with torch.no_grad():
                guess = method.probe(features[:n].to(processes.device)).argmax(1).cpu()
            found["online_probe_top1"] = 100 * (guess == self.labels[:n]).float().mean().item()
        return found

    @torch.no_grad()
    def _outputs(self, method, processes, block: int = 256) -> dict[str, Tensor]:
        """The method's outputs in eval mode on the same views each time: name -> (views, N, D).

        Each rank computes all of them: they are few.
        """
        count, rng = len(self.watched), generator(self.loader.seed, WATCH, 0)
        drawn = [draw(v, count, *self.watched.shape, rng) for v in self.loader.views]
        was_training, blocks = method.training, []
        method.eval()
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            pixels = self.watched.gather(np.arange(count)[rows], processes.device)
            views = self.loader.make_views(
                pixels, [{k: v[rows] for k, v in d.items()} for d in drawn]
            )
            blocks.append({k: x.float().cpu() for k, x in method(*views).items() if k in NAMES})
        method.train(was_training)
        return {name: torch.cat([b[name] for b in blocks], 1) for name in blocks[0]}
