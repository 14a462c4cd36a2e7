"""One training run: optimizer, precision, checkpoints and run folder around a method."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from core.errors import RunError, Stopped
from core.files import write_json
from core.options import as_dict
from training import distributed
from training.checkpoints import Checkpoints, save_file
from training.encoder import check_sizes, save_encoder
from training.loop import Precision, Step, peak_rate, pick_precision, train_steps, warmup_steps
from training.optimizers import build_optimizer
from training.run_folder import RunFolder, git_commit, read_metrics, say

COMPARE_EVERY = 1000  # steps between comparisons of the ranks' weights; also at each save


class Session(contextlib.ExitStack):
    """One training run, new or resumed; leaving the context closes its files.

    config     with the tables encoder, optim, run and the method's
    method     a Method on the CPU; `model` is the method on its device, in DDP if that is used
    loader     a Loader over the training images
    transform  makes the encoder's inputs in evaluations; saved in encoder.pt
    watch      a Watch, whose signals stop the run; must be set before `steps`
    """

    def __init__(self, config, method, loader, transform, processes, watch=None) -> None:
        super().__init__()
        check_sizes(method.encoder, transform, [v.size or loader.crop_size for v in loader.views])
        o, run = config.optim, config.run
        self.config, self.method, self.loader, self.processes = config, method, loader, processes
        self.transform, self.watch = transform, watch
        self.total = o.total_steps(loader.steps_per_epoch)
        self.stop = min(run.stop_after or self.total, self.total)
        self.warmup = warmup_steps(o.warmup_epochs, loader.steps_per_epoch, self.total)
        self.peak = peak_rate(o.optimizer, o.lr, o.batch_size)
        self.done, self.before, self.began = 0, 0.0, time.perf_counter()
        self.model = distributed.wrap(method, processes, run.batch_norm, run.compile, o.accumulate)
        groups = groups_of(method, o.weight_decay)
        self.optimizer = build_optimizer(o.optimizer, groups, o.momentum, o.nesterov)
        precision = pick_precision(run.precision, processes.device)
        self.precision = Precision(precision, processes.device)
        self.facts = {"images": len(loader.images), "precision": precision}
        self.facts["digest of the images"] = loader.images.digest()
        out, resume = Path(run.out), bool(run.resume)
        self.checkpoints = Checkpoints(out / "checkpoints", run.save_every, run.keep)
        folder = RunFolder(out, None, processes, resume=resume, overwrite=run.overwrite)
        self.folder = self.enter_context(folder)
        try:
            self._resume()
        except BaseException:
            self.close()  # or the process would keep the lock until it ends
            raise

    def _resume(self) -> None:
        """Restore the checkpoint that --resume names, and write config.json."""
        run, changed = self.config.run, True
        if run.resume:
            from training.resume import resume  # not for a new run

            changed = resume(self)
        self.compare_replicas()
        self.folder.write_config(as_dict(self.config), self.done, run.override and changed)

    @property
    def seconds(self) -> float:
        """Duration of the run so far, including the time before a resume."""
        return self.before + time.perf_counter() - self.began

    @property
    def meta(self) -> dict:
        """The metadata in encoder.pt."""
        meta = self.config.encoder.shape | {"init": self.config.encoder.init}
        meta |= {"crop_size": self.loader.crop_size, **self.transform.meta()}
        meta |= {"method": self.method.name, "step": self.done, "seed": self.loader.seed}
        return meta | {"commit": git_commit()}

    def describe(self, init: str) -> str:
        """Two lines: the encoder; device, precision, steps and the scaled learning rate."""
        e, o, p = self.config.encoder, self.config.optim, self.processes
        epochs = self.total / self.loader.steps_per_epoch
        trained = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        text = (
            f"{e}, init {init}: {trained:,} trained parameters\n"
            f"{p.world_size} x {p.device.type}, {self.precision.name}; {self.total:,} steps of "
            f"{o.batch_size} images ({epochs:.3g} epochs), {o.optimizer}, "
            f"learning rate {self.peak:g} after a warm-up of {self.warmup:,} steps"
        )
        if self.warmup < round(o.warmup_epochs * self.loader.steps_per_epoch):
            text += f", half of the run, instead of --warmup-epochs {o.warmup_epochs:g}"
        return text + (f"; going on from step {self.done:,}" if self.done else "")

    def steps(self) -> Iterator[Step]:
        """Train the steps that are left; yields each, see `train_steps`.

        Raises Stopped, after a save, if a signal or --stop-after ends the run before its last step.
        """
        self.folder.begin(self.done, self.stop)
        if self.folder.board is not None and not self.done:
            self.folder.board.add_image("views", self.loader.preview())
        plan = {"peak": self.peak, "warmup": self.warmup, "total": self.total}
        plan |= {"start": self.done, "stop": self.stop}
        for step in train_steps(self.model, self.loader, self.optimizer, self.precision, **plan):
            yield step
            if self.watch.stop:
                break
        if self.done < self.total:
            say(self.processes, f"stopped after step {self.done:,}; go on with --resume")
            raise Stopped(asked=self.watch.stop)

    def log(self, step: Step, **metrics: float) -> None:
        """Write the metrics of a step if due, see `RunFolder.log`."""
        self.folder.log(step, self.config.run.log_every, **metrics)

    def save_if_due(self, step: Step) -> None:
        """Read the stop and NaN flags; save if due, if a signal asked for it, and at the end."""
        self.done, watch = step.index + 1, self.watch
        due = self.checkpoints.due(step) or step.index == self.stop - 1
        watch.look(step, self.method, self.optimizer, saving=due)
        saving = due or watch.stop or watch.save
        if saving or self.done % COMPARE_EVERY == 0:
            self.compare_replicas()
        if saving:
            self._save()
        if watch.stop:  # torchrun ends all processes when the first exits
            distributed.barrier()

    def _save(self) -> None:
        """Write a checkpoint from which the run continues as if it had never stopped."""
        self.share_buffers()
        if self.processes.main:
            state = {
                "kind": self.method.name,
                "model": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.scaler.state_dict(),
            }
            state |= {"config": as_dict(self.config), "meta": self.meta, "facts": self.facts}
            state |= {"seconds": self.seconds, "processes": self.processes.world_size}
            self.folder.flush()
            self.checkpoints.save(self.done, state)

    def finish(self, result: dict, classifier: Callable[[], dict] | None = None) -> None:
        """Write encoder.pt, result.json, and classifier.pt if there is a `classifier`."""
        if self.processes.main:
            out = self.folder.out
            save_encoder(out / "encoder.pt", self.method.encoder, self.meta)
            if classifier:
                save_file(out / "classifier.pt", classifier())
            write_json(out / "result.json", result)
        distributed.barrier()

    def history(self) -> list[dict]:
        """The metrics of the steps done before this start."""
        rows = read_metrics(self.folder.out / "metrics.jsonl")
        return [row for row in rows if row["step"] < self.done]

    def compare_replicas(self) -> None:
        """RunError, on all ranks, if their number of steps or their weights differ."""
        if self.processes.world_size > 1:
            from training.replicas import compare_replicas  # only for several processes

            local = self.config.run.batch_norm == "local"  # then the buffers differ
            compare_replicas(self.method, self.done, local)

    def share_buffers(self) -> None:
        """With local batch norm, give all ranks rank 0's buffers before an evaluation or a save."""
        if self.processes.world_size > 1 and self.config.run.batch_norm == "local":
            from training.replicas import broadcast_buffers  # only for several processes

            broadcast_buffers(self.method)


def groups_of(method, weight_decay: float) -> list[dict]:
    """The method's parameter groups; RunError if one of its trained parameters is in none."""
    groups = [g | {"params": [*g["params"]]} for g in method.parameter_groups(weight_decay)]
    grouped = {id(p) for group in groups for p in group["params"]}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            raise RunError(
                f"{name} is in no group of {method.name}'s parameter_groups and would not be "
                "trained; add it, or give it requires_grad_(False)"
            )
    return groups
