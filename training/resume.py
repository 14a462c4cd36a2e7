"""Going on with a run: which checkpoint, whether its settings are these, and its state."""

import sys
from pathlib import Path

import torch

from core.errors import UserError
from core.options import differences
from training.checkpoints import SCHEMA, Checkpoints, rejected
from training.load import check_fits, load_file
from training.run_folder import warn

BAD_STATE = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


def resume(session) -> bool:
    """Take over the state of the checkpoint that --resume names; nothing where there is none yet.

    session   a Session that has done nothing
    Returns whether the settings are others than those that the run began with.
    """
    config, method, facts = session.config, session.method, session.facts
    try:
        state = resume_state(session.checkpoints, config.run.resume, config, method, facts)
        if state:
            _take_over(session, state)
        return not state or bool(state["changed"])
    except torch.OutOfMemoryError:
        raise
    except BAD_STATE as error:
        text = f"{type(error).__name__}: {str(error)[:80]}"
        raise UserError(f"--resume: not a training state of this code ({text})") from error


def _take_over(session, state: dict) -> None:
    done, changed = state["step"], ", ".join(state["changed"])
    if type(done) is not int or not 0 < done <= session.total - bool(changed):
        more = f"; {changed} would train nothing" if changed else ""
        raise UserError(f"--resume: {done} steps are done of {session.total}{more}")
    session.done = restore(state, session.method, session.optimizer, session.precision)
    session.before = float(state["seconds"])
    processes = session.processes
    if changed:
        warn(processes, f"--override: {changed}")
    if processes.main:
        set_aside(session.checkpoints, session.done)
    if state["processes"] != processes.world_size:
        warn(
            processes,
            f"going on with {processes.world_size} processes after {state['processes']}: "
            "the same images and views, sums rounded in another order",
        )


def set_aside(checkpoints: Checkpoints, after: int) -> None:
    """Rename those of later steps: damaged, or of a past that this run does not go on from."""
    for path in [p for p in checkpoints.list() if p.stem > f"step-{after:08d}"]:
        path.rename(path.with_name(f"aside-{path.name}"))


def newest_valid(checkpoints: Checkpoints) -> dict | None:
    """The newest checkpoint that is whole; None where there was never one.

    Each one passed over is named with the reason; UserError where all are bad.
    """
    found = checkpoints.list()
    for path in reversed(found):
        reason = rejected(path)
        if not reason:
            return load_file(path, "--resume")
        print(f"warning: {path}: {reason}; trying the one before", file=sys.stderr)
    if found:
        names = ", ".join(p.name for p in found)
        raise UserError(
            f"--resume: no valid checkpoint in {checkpoints.folder} ({names} are damaged)"
        )
    return None


def resume_state(checkpoints: Checkpoints, resume: str, config, method, facts: dict) -> dict | None:
    """The checkpoint that --resume names, checked against the settings; None for a fresh start.

    facts   what must be as it was without being a setting: number of images, actual precision
    With --override, state["changed"] lists what differs.
    """
    if not resume:
        return None
    if resume == "auto":
        state = newest_valid(checkpoints)
    else:
        path = Path(resume)
        state = load_file(path, "--resume")
        if reason := rejected(path):
            raise UserError(f"--resume {path}: {reason}")
    if state is None:
        return None
    if not isinstance(state, dict) or state.get("kind") != method.name:
        raise UserError(f"--resume {resume}: not a checkpoint of {method.name}")
    if state["schema"] != SCHEMA:
        raise UserError(
            f"--resume {resume}: its format is {state['schema']}, this code reads {SCHEMA}; "
            "go on with the commit that its config.json names"
        )
    changed = differences(config, state["config"])
    changed += [
        f"{k} {state['facts'][k]} -> {v}" for k, v in facts.items() if state["facts"][k] != v
    ]
    if changed and not config.run.override:
        text = ", ".join(changed)
        raise UserError(f"--resume: these differ from the run's: {text} (--override allows it)")
    return state | {"changed": changed}


def restore(state: dict, method, optimizer, precision) -> int:
    """Load a training state into its parts; returns the number of steps done.

    UserError, and nothing is changed, where the networks are others.  With --override the new
    settings hold, and another optimizer starts without a past.
    """
    check_fits(method.state_dict(), state["model"], "--resume: its network", "these settings")
    method.load_state_dict(state["model"])
    if not any(text.startswith("--optimizer ") for text in state["changed"]):
        past = {"state": state["optimizer"]["state"]}  # the groups' settings are the new ones
        optimizer.load_state_dict(optimizer.state_dict() | past)
    precision.load_state_dict(state["scaler"])
    return state["step"]
