"""Options, recipes and the command line: dataclasses whose fields are TOML keys and flags.

The settings of a command are a subclass of `Config`.  Its fields that are dataclasses are tables of
a recipe; its other fields are flags of that command only.  Keys of the tables in `PLAIN` are plain
flags (`--lr`), keys of other tables are dotted flags (`--byol.base-tau`).

A later source overrides an earlier one: the dataclass's default, the method's defaults, the run of
--ckpt, the recipe's shared tables, the recipe's table of the method, the command line.  Without
--recipe, the recipe of the run of --ckpt comes before that run.
"""

import argparse
import dataclasses
import difflib
import functools
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

from core.errors import UserError, warn_once

PLAIN = ("data", "encoder", "optim", "run")
# All commands read the same recipes: other commands' tables are ignored, unknown ones are errors.
TABLES = (*PLAIN, *"view1 view2 byol baseline linear mlp augmented finetune reproduce".split())
VARIANTS = Path(__file__).parent.parent / "variants"
SHOWN = 20  # of an option with more choices, --help lists none and an error the nearest 20
REMOVED = {
    "max_steps": "use --steps",
    "replicas_every": "the processes are compared at each save and every 1,000 steps",
}


def option(default, help: str, *, low=None, high=None, choices=None, trajectory=True, bare=None):
    """A dataclass field with a help text, a range or choices, and what a resume needs to know.

    trajectory   whether it changes the trained weights; a resume may not change such options
    bare         value of the flag when it is typed without one, as in `--resume`
    """
    meta = dict(help=help, low=low, high=high, choices=choices, trajectory=trajectory, bare=bare)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


# an option that does not change the trained weights
running = functools.partial(option, trajectory=False)


@dataclass(kw_only=True)
class Config:
    """All settings of one command: its tables, and its flags that are in no table.

    recipe_tables   the tables of the recipe, unchanged
    typed           the values of the command line: {"optim.lr": 0.2, "head": "mlp", ...}
    """

    method_table: typing.ClassVar[str] = ""  # its name; the table may also set keys of [optim]
    defaults: typing.ClassVar[dict] = {}  # tables that override the dataclasses' defaults
    ignored: typing.ClassVar[tuple] = ()  # tables of a recipe that this command does not read

    recipe: str = running("", "TOML file, see recipes/")
    recipe_tables: dict = dataclasses.field(default_factory=dict)
    typed: dict = dataclasses.field(default_factory=dict)


@functools.cache  # settings compare equal only if their class is the same
def with_method(config_class: type[Config], method_class) -> type[Config]:
    """A subclass of `config_class` with the method's defaults and its table, also as `.method`."""
    name = method_class.name
    fields = [(name, method_class.Config)]
    namespace = {
        "method_table": name,
        "defaults": method_class.defaults,
        "method": property(lambda config: getattr(config, name)),
    }
    return dataclasses.make_dataclass(
        config_class.__name__, fields, bases=(config_class,), namespace=namespace, kw_only=True
    )


class Option(typing.NamedTuple):
    """A field of a table with its type."""

    field: dataclasses.Field
    kind: type

    def check(self, value, label: str):
        """`value` in the field's type; UserError that names `label` and what is allowed."""
        if typing.get_origin(self.kind) is not list:
            return self._check_scalar(value, self.kind, label)
        if not isinstance(value, list | tuple) or not value:
            default = self.field.default_factory()
            raise UserError(f"{label} = {value!r}: expected a list such as {default}")
        return [self._check_scalar(v, typing.get_args(self.kind)[0], label) for v in value]

    def _check_scalar(self, value, kind, label: str):
        choices, low, high = (self.field.metadata[name] for name in ("choices", "low", "high"))
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{label} = {value!r}: expected {kind.__name__}")
        if choices and value not in choices:
            names = difflib.get_close_matches(value, choices, SHOWN, 0)  # the nearest first
            names += ["..."] if len(choices) > SHOWN else []
            raise UserError(f"{label} = {value!r}: expected one of {', '.join(names)}")
        if kind is str:
            return value
        if low is not None and value < low:
            raise UserError(f"{label} = {value!r}: must be at least {low}")
        if high is not None and value > high:
            raise UserError(f"{label} = {value!r}: must be at most {high}")
        if not abs(value) < 2**63:  # also false for nan
            raise UserError(f"{label} = {value!r}: must be a number below 2^63")
        return kind(value)


def options_of(table: type) -> dict[str, Option]:
    """The options of a dataclass by name, without its other fields."""
    hints = typing.get_type_hints(table)
    fields = [field for field in dataclasses.fields(table) if "help" in field.metadata]
    return {field.name: Option(field, hints[field.name]) for field in fields}


def tables_of(config_class: type[Config]) -> dict[str, type]:
    """The tables of a command's settings: name -> dataclass."""
    hints = typing.get_type_hints(config_class)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _accepted(name: str, table) -> dict[str, Option]:
    """The options that a recipe may set in a table.

    Commands have different classes for [data], [encoder] and [run], with one base class each; the
    options of all its subclasses are accepted and checked.
    """
    if name not in PLAIN:
        return options_of(type(table))
    root = [kind for kind in type(table).__mro__ if dataclasses.is_dataclass(kind)][-1]
    family, accepted = [root], {}
    for kind in family:  # grows in the loop
        family += kind.__subclasses__()
        accepted |= options_of(kind)
    return accepted


def flag_of(key: str) -> str:
    """The flag of a key: "optim.batch_size" -> --batch-size, "byol.hidden" -> --byol.hidden."""
    table, _, name = key.rpartition(".")
    name = name.replace("_", "-")
    return f"--{table}.{name}" if table and table not in PLAIN else f"--{name}"


def read_recipe(path: str | Path, known: typing.Iterable[str] = ()) -> dict:
    """The tables of a recipe file.

    UserError if it can't be read, is not TOML, or has a table that is neither in `known` nor that
    of another command or of a file in variants/.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; see the folder recipes/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe {path}: not valid TOML: {error}") from None
    for name in tables:
        if name not in (*known, *TABLES) and not (VARIANTS / f"{name}.py").exists():
            raise UserError(f"--recipe {path}: unknown table [{name}]" + _hint(name, TABLES))
    return tables


def _hint(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}"


def make_config(
    config_class: type[Config], typed: dict, *, run: dict | None = None, recipe: dict | None = None
) -> Config:
    """The settings of a command.

    typed    values of the command line, see `parse`
    run      tables of the run of --ckpt
    recipe   tables of that run's recipe, used if `typed` has no recipe
    UserError for unknown names and for values out of range.
    """
    tables = {name: table() for name, table in tables_of(config_class).items()}
    if unknown := [name for name in config_class.defaults if name not in tables]:
        raise UserError(f"defaults: unknown table {unknown[0]}" + _hint(unknown[0], tables))
    _override(tables, config_class.method_table, config_class.defaults, "defaults")
    run, recipe = run or {}, recipe or {}
    sources = [("the recipe of --ckpt", recipe), ("the run of --ckpt", run)]
    if file := typed.get("recipe"):
        recipe = read_recipe(file, tables)
        sources = [("the run of --ckpt", run), (f"--recipe {file}", recipe)]
    for source, values in sources:
        kept = {name: table for name, table in values.items() if name not in config_class.ignored}
        _override(tables, config_class.method_table, kept, source)
    flags = {}
    for key, value in typed.items():
        table, _, name = key.rpartition(".")
        if table:
            _set(tables, table, name, value, flag_of(key))
        else:
            flags[name] = options_of(config_class)[name].check(value, flag_of(key))
    if "optim.epochs" in typed and "optim.steps" not in typed:
        tables["optim"].steps = 0
    for name, table in tables.items():
        if hasattr(table, "check"):
            table.check(name)
    return config_class(**tables, **flags, recipe_tables=recipe, typed=typed)


def _override(tables: dict, method_table: str, values: dict, source: str) -> None:
    """Set all options in `values`, {table: {key: value}}; the method's table overrides [optim]."""
    for name in sorted(values, key=lambda name: name == method_table):  # False before True
        if name not in tables:
            continue
        if not isinstance(values[name], dict):
            raise UserError(f"{source}: {name} must be a table, [{name}]")
        for key, value in values[name].items():
            if key in REMOVED:
                warn_once(f"{source}: [{name}] {key} was removed: {REMOVED[key]}")
                continue
            accepted, home = _accepted(name, tables[name]), name
            if name == method_table and key not in accepted:
                accepted, home = accepted | _accepted("optim", tables["optim"]), "optim"
            if key not in accepted:
                raise UserError(f"{source}: [{name}] has no key {key}" + _hint(key, accepted))
            _set(tables, home, key, value, f"{source}: [{name}] {key}")
            if (home, key) == ("optim", "epochs") and "steps" not in values[name]:
                tables["optim"].steps = 0  # they replace the steps of an earlier source


def _set(tables: dict, name: str, key: str, value, label: str) -> None:
    """Check one value and set it; an option of another command is only checked."""
    value = _accepted(name, tables[name])[key].check(value, label)
    if key in options_of(type(tables[name])):
        setattr(tables[name], key, value)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that keeps the description's line breaks and raises UserError."""

    def __init__(self, description: str) -> None:
        keep = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=keep, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(config_class: type[Config], argv: list[str], description: str) -> dict:
    """The values of the command line by key: {"optim.lr": 0.2, "head": "mlp", ...}."""
    for word in argv:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in REMOVED:
            raise UserError(f"{word} was removed: {REMOVED[name]}")
    if "ckpt" in options_of(config_class):
        description += "\nIn [...]: defaults, which the run of --ckpt and its recipe override."
    parser = Parser(description)
    defaults = make_config(config_class, {})
    _add_flags(parser, "", config_class, defaults)
    for name, table in tables_of(config_class).items():
        title = (table.__doc__ or name).splitlines()[0].rstrip(".")
        _add_flags(parser.add_argument_group(title), name, table, getattr(defaults, name))
    return vars(parser.parse_args(argv))


def _add_flags(group, table: str, table_class: type, defaults) -> None:
    """Add a flag for each option; the parsed result holds only the flags that were typed."""
    for name, (field, kind) in options_of(table_class).items():
        key, default = f"{table}.{name}".lstrip("."), getattr(defaults, name)
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        keywords = {"dest": key, "default": argparse.SUPPRESS}
        text = field.metadata["help"] + (f" [{shown}]" if shown != "" else "")
        keywords["help"] = text.replace("%", "%%")  # argparse formats it
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            choices = field.metadata["choices"] or ()
            few = choices if 0 < len(choices) <= SHOWN else None  # argparse would list many in full
            keywords["metavar"] = "|".join(few) if few else name.upper()
            keywords |= {"type": kind, "choices": few}
            if typing.get_origin(kind) is list:
                keywords |= {"nargs": "+", "type": typing.get_args(kind)[0]}
            elif bare := field.metadata["bare"]:
                keywords |= {"nargs": "?", "const": bare}
        group.add_argument(flag_of(key), **keywords)


def as_dict(config: Config) -> dict:
    """The settings as config.json and checkpoints store them: {table: {key: value}}.

    "flags" has the flags that are in no table, "recipe" the recipe's tables, which an evaluation
    of the run uses.
    """
    tables = tables_of(type(config))
    settings = {name: dataclasses.asdict(getattr(config, name)) for name in tables}
    flags = {name: getattr(config, name) for name in options_of(type(config))}
    return settings | {"flags": flags, "recipe": config.recipe_tables}


def differences(config: Config, saved: dict) -> list[str]:
    """How options with `trajectory` differ from a saved run's: ["--lr 0.3 -> 0.2", ...]."""
    changed = []
    if config.method_table and config.method_table not in saved:
        changed.append(f"a run without [{config.method_table}] -> {config.method_table}")
    sections = {"flags": config} | {name: getattr(config, name) for name in tables_of(type(config))}
    for section, table in sections.items():
        for name, option in options_of(type(table)).items():
            new = getattr(table, name)
            default = getattr(type(table), name, new)  # lists have none
            old = saved.get(section, {}).get(name, default)  # an older run lacks newer options
            if option.field.metadata["trajectory"] and old not in (new, None):  # None: left open
                key = name if table is config else f"{section}.{name}"
                changed.append(f"{flag_of(key)} {old} -> {new}")
    return changed
