"""[run]: where and how a command runs.  Each command takes the class with the options it needs."""

from dataclasses import dataclass

from core.options import option, running


@dataclass
class RunConfig:
    """[run]: where and how it runs; little of it changes the result."""

    # no options here; commands that have --overwrite or --resume make options of them
    overwrite = False
    resume = ""

    out: str = running("", "run folder (default: a name in runs/, or beside --ckpt)")
    device: str = running("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    gpus: int = running(1, "processes on this machine, one a GPU", low=1)
    threads: int = running(0, "CPU threads of a process (0: cores / processes)", low=0, high=1024)
    dist_timeout: float = running(
        600, "seconds until a stalled process is an error", low=1, high=10**6
    )
    quiet: bool = running(False, "print errors only")
    debug: bool = running(False, "show tracebacks")


@dataclass
class EvalRun(RunConfig):
    """[run] of a command that writes one run folder."""

    overwrite: bool = running(False, "rename an existing run folder away")
    seed: int = option(0, "seed of all random numbers", low=0, high=2**63 - 1)


@dataclass
class LoopRun(RunConfig):
    """[run] of the commands that train."""

    data_on_device: str = running(
        "auto",
        "training images in the GPU's memory (auto: where they take less than half of it)",
        choices=("auto", "always", "never"),
    )
    precision: str = option(
        "auto", "arithmetic of the network", choices=("auto", "fp32", "bf16", "fp16")
    )
    batch_norm: str = option(
        "sync", "statistics over all processes or in each", choices=("sync", "local")
    )
    compile: bool = option(False, "torch.compile the network")
    log_every: int = running(20, "steps between log lines", low=1)
    save_every: int = running(1000, "steps between checkpoints (0: only the last)", low=0)
    keep: int = running(2, "checkpoints kept", low=2)
    check_every: int = running(
        0, "check for stop requests and NaNs every N steps (0: 1 on CPU, 20 on CUDA)", low=0
    )


@dataclass
class TableRun(LoopRun):
    """[run] of reproduce.py: where and how the runs of its table run."""

    knn_every: int = running(1000, "steps between k-NN and collapse metrics (0: never)", low=0)


@dataclass
class TrainRun(LoopRun, EvalRun):
    """[run] of a training on labels."""

    resume: str = running("", "continue: auto (newest valid in --out) or a file", bare="auto")
    override: bool = running(False, "resume although settings that shape the result have changed")
    stop_after: int = running(0, "stop after this step, schedules unchanged (0: run all)", low=0)


@dataclass
class PretrainRun(TrainRun, TableRun):
    """[run] of pretraining."""

    online_probe: bool = option(False, "also train a linear probe on detached features")
