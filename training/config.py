"""[run]: where and how a command runs.  Each command uses the class with the options it needs."""

from dataclasses import dataclass

from core.options import option, running


@dataclass
class RunConfig:
    """[run]: run folder, devices and processes."""

    # not options here, but in the subclasses whose commands have --overwrite or --resume
    overwrite = False
    resume = ""

    out: str = running("", "run folder (default: a name in runs/, or in that of --ckpt)")
    device: str = running("auto", "cpu, cuda, mps, xpu ...; auto: cuda if there is one, else cpu")
    gpus: int = running(1, "processes on this machine, one per GPU", low=1)
    threads: int = running(0, "CPU threads per process (0: cores / processes)", low=0, high=1024)
    dist_timeout: float = running(600, "seconds to wait for another process", low=1, high=10**6)
    quiet: bool = running(False, "print errors only")
    debug: bool = running(False, "show tracebacks")


@dataclass
class EvalRun(RunConfig):
    """[run]: run folder, devices, processes and seed."""

    overwrite: bool = running(False, "rename an existing run folder")
    seed: int = option(0, "seed of all random numbers", low=0, high=2**63 - 1)


@dataclass
class LoopRun(RunConfig):
    """[run]: how a training runs."""

    data_on_device: str = running(
        "auto",
        "keep training images in GPU memory (auto: if they fit in half of it)",
        choices=("auto", "always", "never"),
    )
    precision: str = option("auto", "number format", choices=("auto", "fp32", "bf16", "fp16"))
    batch_norm: str = option("sync", "statistics: global or per rank", choices=("sync", "local"))
    compile: bool = option(False, "torch.compile the network")
    log_every: int = running(20, "steps between log lines", low=1)
    save_every: int = running(1000, "steps between checkpoints (0: only the last)", low=0)
    keep: int = running(2, "checkpoints kept", low=2)
    check_every: int = running(
        0, "check for stop requests and NaNs every N steps (0: 1 on CPU, else 20)", low=0
    )


@dataclass
class TableRun(LoopRun):
    """[run]: how the runs of a table run."""

    knn_every: int = running(1000, "steps between k-NN and collapse metrics (0: never)", low=0)


@dataclass
class TrainRun(LoopRun, EvalRun):
    """[run]: how supervised training runs."""

    resume: str = running("", "continue: auto (newest valid in --out) or a file", bare="auto")
    override: bool = running(False, "resume although settings that shape the result have changed")
    stop_after: int = running(0, "stop after this step, schedules unchanged (0: run all)", low=0)


@dataclass
class PretrainRun(TrainRun, TableRun):
    """[run]: how pretraining runs."""

    online_probe: bool = option(False, "also train a linear probe on detached features")
