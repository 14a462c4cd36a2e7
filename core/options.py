"""Options, recipes and the command line: dataclasses whose fields are TOML keys and flags.

A section is one dataclass and one TOML table.  Fields of the sections in `PLAIN` are plain flags
(`--lr`), those of all others are dotted (`--view1.blur-p`, `--byol.base-tau`).  A value comes from,
in rising precedence: the dataclass's default, the method's defaults, the checkpoint's run (for
evaluations), the recipe's shared tables, the recipe's table of the script, the command line.
"""

import argparse
import dataclasses
import difflib
import functools
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from core.errors import UserError

PLAIN = ("data", "encoder", "optim", "run")
# Tables of other scripts and methods in a recipe are ignored; what is no table at all is an error.
OTHERS = "view1 view2 byol baseline linear mlp augmented finetune reproduce".split()
KNOWN_TABLES = (*PLAIN, *OTHERS)
VARIANTS = Path(__file__).parent.parent / "variants"


def option(default, help: str, *, low=None, high=None, choices=None, trajectory=True):
    """A dataclass field with its help text, its range or choices, and whether it shapes the run.

    `trajectory` marks what changes the weights that a run ends with; a resume compares those.
    """
    metadata = dict(help=help, low=low, high=high, choices=choices, trajectory=trajectory)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# an option that leaves the weights alone
running = functools.partial(option, trajectory=False)


@dataclass
class RunConfig:
    """[run]: where and how it runs; little of it changes the result."""

    out: str = running("", "run folder (default runs/METHOD-DATASET)")
    resume: str = running("", "continue: auto (newest valid in --out) or a file")
    override: bool = running(False, "resume although settings that shape the result have changed")
    overwrite: bool = running(False, "rename an existing run folder away")
    seed: int = option(0, "seed of initialisation, order and augmentation", low=0, high=2**63 - 1)
    device: str = running("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    data_on_device: str = running(
        "auto",
        "training images in the GPU's memory (auto: where they take less than half of it)",
        choices=("auto", "always", "never"),
    )
    gpus: int = running(1, "processes on this machine, one a GPU", low=1)
    precision: str = option(
        "auto", "arithmetic of the network", choices=("auto", "fp32", "bf16", "fp16")
    )
    batch_norm: str = option(
        "sync", "statistics over all processes or in each", choices=("sync", "local")
    )
    compile: bool = option(False, "torch.compile the network")
    threads: int = running(0, "CPU threads of a process (0: cores / processes)", low=0, high=1024)
    log_every: int = running(20, "steps between log lines", low=1)
    save_every: int = running(1000, "steps between checkpoints (0: only the last)", low=0)
    keep: int = running(2, "checkpoints kept", low=2)
    check_every: int = running(
        0, "check for stop requests and NaNs every N steps (0: 1 on CPU, 20 on CUDA)", low=0
    )
    replicas_every: int = running(
        1000, "compare the processes' weights every N steps, besides each save (0: never)", low=0
    )
    knn_every: int = running(1000, "steps between k-NN and collapse metrics (0: never)", low=0)
    stop_after: int = running(0, "stop after this step, schedules unchanged (0: run all)", low=0)
    online_probe: bool = option(False, "also train a linear probe on detached features")
    dist_timeout: float = running(
        600, "seconds until a stalled process is an error", low=1, high=10**6
    )
    quiet: bool = running(False, "print errors only")
    debug: bool = running(False, "show tracebacks")


def flag_of(section: str, name: str) -> str:
    """The flag of a table's key: ("optim", "batch_size") -> --batch-size."""
    name = name.replace("_", "-")
    return f"--{name}" if section in PLAIN else f"--{section}.{name}"


def check(value, field: dataclasses.Field, kind, label: str):
    """`value` as the field's type, or a UserError that names `label` and the allowed range."""
    meta, origin = field.metadata, typing.get_origin(kind)
    if origin is list:
        (inner, *_), default = typing.get_args(kind), field.default_factory()
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"{label} = {value!r}: expected a list such as {default}")
        return [_scalar(v, inner, meta, label) for v in value]
    return _scalar(value, kind, meta, label)


def _scalar(value, kind, meta, label):
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not right or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{label} = {value!r}: expected {kind.__name__}")
    value = kind(value)
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{label} = {value!r}: expected one of {', '.join(meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if kind is not str and not (
        (low is None or value >= low) and (high is None or value <= high) and abs(value) < 2**63
    ):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        bounds += ["below 2^63"] * (not abs(value) < 2**63)
        raise UserError(f"{label} = {value!r}: must be {' and '.join(bounds) or 'a number'}")
    return value


def read_recipe(path: str | Path) -> dict:
    """The tables of a recipe file; a UserError where it is missing or is not TOML."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; see the folder recipes/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: not valid TOML: {error}") from None


def _near(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def _layer(
    values: dict, sections: dict, tables: dict, own: str | None, source: str, skip: tuple = ()
) -> None:
    """Lay `tables` over `values`; the table `own` may set the fields of [optim] as well."""
    shared = [t for t in tables if t in sections and t not in (own, *skip)]
    for table in shared + [own] * (own in tables):
        if not isinstance(tables[table], dict):
            raise UserError(f"{source}: {table} must be a table, [{table}]")
        for key, value in tables[table].items():
            home = table
            if table == own and key not in values[own] and key in values.get("optim", {}):
                home = "optim"
            if key not in values[home]:
                raise UserError(f"{source}: [{table}] has no key {key}" + _near(key, values[home]))
            _put(values, sections, home, key, value, f"{source}: [{table}] {key}")


def _put(values: dict, sections: dict, section: str, name: str, value, label: str) -> None:
    """Set one value after `check`."""
    field = {f.name: f for f in dataclasses.fields(sections[section])}[name]
    kind = typing.get_type_hints(sections[section])[name]
    values[section][name] = check(value, field, kind, label)


class Parser(argparse.ArgumentParser):
    """Wrong words are a UserError."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def _parser(description, sections, values, extra, hide) -> Parser:
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="FILE", help="TOML file, see recipes/")
    for flags, keywords in extra:
        parser.add_argument(*flags, **keywords)
    for section, cls in sections.items():
        title = (cls.__doc__ or section).splitlines()[0].rstrip(".")
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name in hide:
                continue
            kind, keywords = hints[field.name], {"default": argparse.SUPPRESS}
            default = values[section][field.name]
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            keywords["help"] = f"{field.metadata['help']} [{shown}]"
            keywords["dest"] = f"{section}.{field.name}"
            if kind is bool:
                keywords["action"] = argparse.BooleanOptionalAction
            elif typing.get_origin(kind) is list:
                keywords |= dict(nargs="+", type=typing.get_args(kind)[0])
                keywords["metavar"] = field.name.upper()
            else:
                keywords |= dict(type=kind, metavar=field.name.upper())
                if field.name == "resume":
                    keywords |= dict(nargs="?", const="auto")
                if field.metadata["choices"]:
                    keywords["metavar"] = "|".join(field.metadata["choices"])
            group.add_argument(flag_of(section, field.name), **keywords)
    return parser


def read_config(
    argv: list[str],
    sections: dict[str, type],
    *,
    own: str | None = None,
    defaults: dict | None = None,
    inherit=None,
    description: str = "",
    extra: tuple = (),
    hide: tuple = (),
    skip: tuple = (),
) -> SimpleNamespace:
    """The settings of a script: one attribute for each section, and those of `extra` arguments.

    sections   section name -> dataclass
    own        the script's or method's own section, also found as `.method`
    defaults   tables that the method lays over the dataclasses' defaults
    inherit    function of the extra arguments (such as --ckpt) that gives further default tables,
               and those of a recipe that takes the place of --recipe
    extra      ((flags, keywords of add_argument), ...)
    hide       options that have no meaning for this script: no flags, but keys in recipes
    skip       shared tables of recipes that are other scripts'
    Raises UserError for anything unknown or out of range.
    """
    values = {name: dataclasses.asdict(cls()) for name, cls in sections.items()}
    if unknown := [table for table in defaults or {} if table not in sections]:
        raise UserError(f"defaults: unknown table {unknown[0]}" + _near(unknown[0], sections))
    _layer(values, sections, defaults or {}, None, "defaults")
    given = vars(_parser(description, sections, values, extra, hide).parse_args(argv))
    flags = {key: given.pop(key) for key in list(given) if "." in key}
    tables, source = {}, f"--recipe {given['recipe']}"
    if inherit:  # the run's settings, and its recipe's where none is given
        shared, tables = inherit(SimpleNamespace(**given))
        if not given["recipe"]:
            _layer(values, sections, tables, own, "the recipe of --ckpt", skip)
        _layer(values, sections, shared, None, "the run of --ckpt")
    if given["recipe"]:
        tables = read_recipe(given["recipe"])
        for table in tables:
            if table not in (*sections, *KNOWN_TABLES) and not (VARIANTS / f"{table}.py").exists():
                raise UserError(f"{source}: unknown table [{table}]" + _near(table, KNOWN_TABLES))
        _layer(values, sections, tables, own, source, skip)
    for key, value in flags.items():
        section, name = key.split(".")
        _put(values, sections, section, name, value, flag_of(section, name))
    optim = values.get("optim", {})
    if optim.get("optimizer") == "adamw" and optim["lr"] > 0.05:
        raise UserError(f"--lr {optim['lr']:g} is a rate for lars or sgd; adamw wants about 1e-3")
    config = SimpleNamespace(**{s: cls(**values[s]) for s, cls in sections.items()}, **given)
    config.sections, config.flags, config.tables = tuple(sections), flags, tables
    if own in sections:
        config.method = getattr(config, own)
    return config


def as_dict(config: SimpleNamespace) -> dict:
    """Plain types only, so that weights_only loading can hold it: one table a section.

    "recipe" holds the recipe's own tables: an evaluation of the run starts from them.
    """
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in config.sections}
    return settings | {"recipe": config.tables}


def differences(config: SimpleNamespace, saved: dict) -> list[str]:
    """What a resume changes of all that shapes the trajectory: "--lr 0.3 -> 0.2", ..."""
    found = []
    for section in config.sections:
        for field in dataclasses.fields(getattr(config, section)):
            new = getattr(getattr(config, section), field.name)
            old = saved.get(section, {}).get(field.name, new)
            if field.metadata["trajectory"] and old != new:
                found.append(f"{flag_of(section, field.name)} {old} -> {new}")
    return found
