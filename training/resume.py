"""Resume a run: find the checkpoint, compare its settings, restore its state."""

from pathlib import Path

from core.errors import UserError, warn_once
from core.options import differences
from training.checkpoints import SCHEMA, Checkpoints, rejected
from training.run_folder import warn
from training.weights import load_file, load_state


def resume(session) -> bool:
    """Restore the checkpoint that --resume names into a new Session, if there is one yet.

    Returns whether config.json must be written: without a checkpoint, or with changed settings.
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
    if "--optimizer " not in changed:  # a different optimizer starts with an empty state
        saved = {"state": state["optimizer"]["state"]}  # without the groups' old settings
        session.optimizer.load_state_dict(session.optimizer.state_dict() | saved)
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
    """The content of the newest checkpoint with a valid checksum; None if there are no checkpoints.

    resume   "auto", or a file
    A warning names each invalid one that is skipped; UserError if all are invalid.
    """
    paths = checkpoints.list() if resume == "auto" else [Path(resume)]
    problems = []
    for path in reversed(paths):
        reason = rejected(path)
        if not reason:
            for problem in problems:
                warn_once(f"{problem}; skipped")
            return load_file(path, "--resume")
        problems.append(f"{path}: {reason}")
    if problems:
        raise UserError(f"--resume: no valid checkpoint ({'; '.join(problems)})")
    return None


def changes(session, state: dict) -> str:
    """How settings and data differ from those in `state`: "--lr 0.3 -> 0.2, ...".

    UserError for a difference without --override, or if another method or format wrote `state`.
    """
    config, name = session.config, session.method.name
    if (state.get("kind"), state.get("schema")) != (name, SCHEMA):
        raise UserError(
            f"--resume {config.run.resume}: not a checkpoint of {name} in format {SCHEMA}; "
            "go on with the method and the commit that its config.json names"
        )
    changed = differences(config, state["config"])
    for fact, value in session.facts.items():
        if (old := state["facts"].get(fact, value)) != value:  # older checkpoints lack the digest
            changed.append(f"{fact} {old} -> {value}")
    text = ", ".join(changed)
    if changed and not config.run.override:
        raise UserError(f"--resume: these differ from the run's: {text} (--override allows it)")
    return text


def set_aside(checkpoints: Checkpoints, after: int) -> None:
    """Rename checkpoints of later steps: invalid, or left over when a run resumes further back."""
    for path in checkpoints.list():
        if path.stem > f"step-{after:08d}":
            aside = path.with_name(f"aside-{path.name}")
            while aside.exists():
                aside = aside.with_stem(f"{aside.stem}+")
            checksum = path.with_suffix(".sha256")
            if checksum.exists():
                checksum.rename(aside.with_suffix(".sha256"))
            path.rename(aside)
