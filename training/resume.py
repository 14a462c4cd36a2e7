"""Resuming a run: finds the checkpoint, compares its settings, restores its state."""

from pathlib import Path

from core.errors import UserError, warn_once
from core.options import differences
from training.checkpoints import SCHEMA, Checkpoints, rejected
from training.run_folder import warn
from training.weights import load_file, load_state


def resume(session) -> bool:
    """Restore the checkpoint that --resume names; a fresh start where the run has none yet.

    session   a Session that has done nothing
    Returns whether its settings are to be written: it starts afresh, or --override changed them.
    """
    state = newest_valid(session.checkpoints, session.config.run.resume)
    if state is None:
        return True
    changed = changes(session, state)
    done, processes = state["step"], session.processes
    if not 0 < done <= session.total - bool(changed):
        more = f"; {changed} would train nothing" if changed else ""
        raise UserError(f"--resume: {done} steps are done of {session.total}{more}")
    load_state(session.method, state["model"], "--resume: its network", "these settings")
    if "--optimizer " not in changed:  # another one starts without a past
        past = {"state": state["optimizer"]["state"]}  # the groups' settings are the new ones
        session.optimizer.load_state_dict(session.optimizer.state_dict() | past)
    session.precision.load_state_dict(state["scaler"])
    session.done, session.before = done, state["seconds"]
    if changed:
        warn(processes, f"--override: {changed}")
    if processes.main:
        set_aside(session.checkpoints, done)
    before, now = state["processes"], processes.world_size
    if before != now:
        text = f"going on with {now} processes after {before}: sums are rounded in another order"
        warn(processes, text)
    return bool(changed)


def newest_valid(checkpoints: Checkpoints, resume: str = "auto") -> dict | None:
    """The content of the newest checkpoint whose checksum holds, or None where there is none yet.

    resume   "auto", or the one file that is meant
    A warning names each one passed over; UserError where all are bad.
    """
    paths = checkpoints.list() if resume == "auto" else [Path(resume)]
    problems = []
    for path in reversed(paths):
        reason = rejected(path)
        if not reason:
            for problem in problems:
                warn_once(f"{problem}; passed over")
            return load_file(path, "--resume")
        problems.append(f"{path}: {reason}")
    if problems:
        raise UserError(f"--resume: no valid checkpoint ({'; '.join(problems)})")
    return None


def changes(session, state: dict) -> str:
    """What differs from the settings and data of `state`: "--lr 0.3 -> 0.2, ...".

    UserError where it does and --override is not set, or where `state` is of other code.
    """
    config, name = session.config, session.method.name
    if (state.get("kind"), state.get("schema")) != (name, SCHEMA):
        raise UserError(
            f"--resume {config.run.resume}: not a checkpoint of {name} in format {SCHEMA}; "
            "go on with the method and the commit that its config.json names"
        )
    changed = differences(config, state["config"])
    for fact, value in session.facts.items():
        if state["facts"][fact] != value:
            changed.append(f"{fact} {state['facts'][fact]} -> {value}")
    text = ", ".join(changed)
    if changed and not config.run.override:
        raise UserError(f"--resume: these differ from the run's: {text} (--override allows it)")
    return text


def set_aside(checkpoints: Checkpoints, after: int) -> None:
    """Rename those of later steps: damaged, or of a past that this run does not go on from."""
    for path in checkpoints.list():
        if path.stem > f"step-{after:08d}":
            path.rename(path.with_name(f"aside-{path.name}"))
