"""Where a value comes from, and what a mistake looks like."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

import finetune
import linear_eval
import train_baseline
import train_byol
from byol.byol import BYOL
from core.errors import UserError
from core.options import Config, as_dict, differences, make_config, option, parse
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg

ROOT = Path(train_byol.__file__).parent


def simsiam(tmp_path, recipe: str = "", *flags: str):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    return train_byol.configure(["--recipe", str(path), *flags], SimSiam)


def test_precedence_rises_from_default_to_flag(tmp_path):
    assert train_byol.configure([]).optim.lr == 2.0
    assert simsiam(tmp_path).optim.lr == 0.05
    shared, own = "[optim]\nlr = 0.1\n", "[simsiam]\nlr = 0.2\n"
    assert simsiam(tmp_path, shared).optim.lr == 0.1
    assert simsiam(tmp_path, shared + own).optim.lr == 0.2
    assert simsiam(tmp_path, own + shared).optim.lr == 0.2  # their order in the file is nothing
    assert simsiam(tmp_path, shared + own, "--lr", "0.3").optim.lr == 0.3
    # what nobody set stays the method's, and the method's own table is its own
    assert simsiam(tmp_path, shared).optim.weight_decay == 1e-4
    assert simsiam(tmp_path, "[simsiam]\nhidden = 7\n").method.hidden == 7


def test_a_checkpoints_run_comes_before_the_recipe(tmp_path):
    @dataclass
    class Section:
        a: int = option(1, "a")
        b: int = option(1, "b")
        c: int = option(1, "c")
        d: int = option(1, "d")

    @dataclass(kw_only=True)
    class Settings(Config):
        data: Section

    path = tmp_path / "recipe.toml"
    path.write_text("[data]\nb = 3\n")
    run, old = {"data": {"a": 2, "b": 2, "c": 2}}, {"data": {"a": 5, "d": 5}}
    typed = parse(Settings, ["--recipe", str(path), "--c", "4"], "")
    config = make_config(Settings, typed, run=run, recipe=old)
    assert dataclasses.astuple(config.data) == (2, 3, 4, 1)
    config = make_config(Settings, {}, run=run, recipe=old)  # no other recipe: the run's own
    assert dataclasses.astuple(config.data) == (2, 2, 2, 5)


def test_dotted_flags_and_lists():
    flags = ["--view1.blur-p", "0.25", "--byol.base-tau", "0.9", "--view2.area", "0.3", "0.9"]
    config = train_byol.configure(flags)
    assert (config.view1.blur_p, config.view2.blur_p) == (0.25, 0.1)
    assert config.byol.base_tau == 0.9 and config.method is config.byol
    assert config.view2.area == [0.3, 0.9] and config.view1.area == [0.08, 1.0]


def test_switches_go_both_ways(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[encoder]\nzero_init = true\n")
    assert train_byol.configure(["--recipe", str(path)]).encoder.zero_init is True
    flags = ["--recipe", str(path), "--no-zero-init"]
    assert train_byol.configure(flags).encoder.zero_init is False


def test_resume_alone_means_auto():
    assert train_byol.configure([]).run.resume == ""
    assert train_byol.configure(["--resume"]).run.resume == "auto"
    assert train_byol.configure(["--resume", "a.pt"]).run.resume == "a.pt"


WRONG_FLAGS = [
    ("--lr -1", "--lr", "at least 0"),
    ("--lr nan", "--lr", ""),
    ("--lr abc", "--lr", "abc"),
    ("--warmup-epochs inf", "--warmup-epochs", "below 2^63"),
    (f"--steps {10**400}", "--steps", "below 2^63"),
    ("--dist-timeout inf", "--dist-timeout", "at most"),
    ("--byol.base-tau 1.5", "--byol.base-tau", "at most 1"),
    ("--epochs 0", "--epochs", "at least 1"),
    ("--gpus 0", "--gpus", "at least 1"),
    ("--gpus -1", "--gpus", "at least 1"),
    ("--gpus abc", "--gpus", "abc"),
    ("--arch resnet19", "--arch", "expected one of resnet18"),
    ("--arch squeezenet1_0", "--arch", "expected one of"),
    ("--arch swin_t --stem small", "--arch swin_t needs --stem imagenet", "not small"),
    ("--arch swin_t --width 0.5", "--arch swin_t needs --width 1.0", "not 0.5"),
    ("--arch swin_t --zero-init", "--arch swin_t needs --zero-init False", "not True"),
    ("--arch swin_t --image-size 64", "--arch swin_t needs --image-size 0", "not 64"),
    ("--image-size 64", "--arch resnet18 needs --image-size 0", "not 64"),
    ("--stem cifra", "--stem", "cifar"),
    ("--optimizer adam", "--optimizer", "adamw"),
    ("--momentum 1", "--momentum", "0.9999"),
    ("--optimizer sgd --nesterov --momentum 0", "--momentum 0", "--no-nesterov"),
    ("--view1.area 0.5", "view1.area", "two values"),
    ("--view1.area 0.9 0.2", "view1.area", "smaller first"),
    ("--view1.area 0.9 1.2", "--view1.area", "at most 1"),
    ("--temperatur 1", "--temperatur", ""),
    ("--learning 1", "--learning", ""),
    ("--recipe nowhere.toml", "nowhere.toml", "recipes/"),
    ("--recipe .", "--recipe", ""),
]


@pytest.mark.parametrize("flags, name, reason", WRONG_FLAGS)
def test_A1_a_wrong_flag_is_one_line_that_names_it(flags, name, reason):
    with pytest.raises(UserError) as error:
        train_byol.configure(flags.split())
    text = str(error.value)
    assert name in text and reason in text and "\n" not in text


WRONG_RECIPES = [
    ("[optim]\nlearnin_rate = 1\n", "learnin_rate", "[optim]"),
    ("[optim]\nepoch = 1\n", "epoch", "did you mean epochs"),
    ("[byol]\nbase_tau = 1.5\n", "base_tau", "at most 1"),
    ("[byol]\nbase_tau = '0.9'\n", "base_tau", "float"),
    ("[optim]\nepochs = 1.5\n", "epochs", "int"),
    ("[optim]\nepochs = true\n", "epochs", "int"),
    ("[optim]\nepochs = -3\n", "epochs", "at least 1"),
    ("[encoder]\nzero_init = 1\n", "zero_init", "bool"),
    ("[encoder]\nstem = 'stil'\n", "stem", "imagenet"),
    ("[view1]\narea = 0.5\n", "area", "list"),
    ("[view1]\narea = []\n", "area", "list"),
    ("[view1]\narea = ['a', 'b']\n", "area", ""),
    ("optim = 3\n", "optim", "table"),
    ("lr = 3\n", "lr", ""),
    ("[optm]\nlr = 3\n", "optm", "did you mean optim"),
    ("[optim\nlr = 3\n", "recipe.toml", "not valid TOML"),
    ("[optim]\nlr = 1\nlr = 2\n", "recipe.toml", "not valid TOML"),
]


@pytest.mark.parametrize("recipe, name, reason", WRONG_RECIPES)
def test_A1_a_wrong_recipe_is_one_line_that_names_file_and_key(tmp_path, recipe, name, reason):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    with pytest.raises(UserError) as error:
        train_byol.configure(["--recipe", str(path)])
    text = str(error.value)
    assert str(path) in text and name in text and reason in text and "\n" not in text


def test_a_recipe_that_is_no_text(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        train_byol.configure(["--recipe", str(path)])


def test_tables_of_others_are_ignored_from_any_folder(tmp_path, monkeypatch):
    path = tmp_path / "recipe.toml"
    path.write_text("[simsiam]\nno_such = 1\nlr = 9\n[linear]\nno_such = 1\n[baseline]\nlr = 8\n")
    monkeypatch.chdir(tmp_path)
    assert train_byol.configure(["--recipe", str(path)]).optim.lr == 2.0
    assert "simsiam" not in as_dict(train_byol.configure(["--recipe", str(path)]))


def test_each_script_reads_its_own_table(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[optim]\nlr = 1\nepochs = 3\n[baseline]\nlr = 2\nflip_p = 0\n[byol]\nlr = 3\n")
    assert train_byol.configure(["--recipe", str(path)]).optim.lr == 3
    config = train_baseline.configure(["--recipe", str(path)])
    assert (config.optim.lr, config.optim.epochs, config.method.flip_p) == (2, 100, 0)


def test_integers_become_the_fields_type(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[optim]\nlr = 1\n")
    value = train_byol.configure(["--recipe", str(path)]).optim.lr
    assert value == 1 and type(value) is float


def as_toml(tables: dict) -> str:
    """Strings, numbers, switches and lists look the same in JSON and TOML."""
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]"] + [f"{k} = {json.dumps(v)}" for k, v in table.items()]
    return "\n".join(lines)


def test_as_dict_is_a_recipe_of_the_same_settings(tmp_path):
    flags = ["--lr", "0.125", "--view1.area", "0.25", "1", "--out", "a b", "--no-compile",
             "--byol.hidden", "9", "--steps", "17"]  # fmt: skip
    tables = as_dict(train_byol.configure(flags))
    assert (tables.pop("recipe"), tables.pop("flags")) == ({}, {"recipe": ""})
    path = tmp_path / "recipe.toml"
    path.write_text(as_toml(tables))
    assert tomllib.loads(path.read_text()) == tables
    again = as_dict(train_byol.configure(["--recipe", str(path)]))
    assert again == {**tables, "recipe": tables, "flags": {"recipe": str(path)}}


def test_what_was_typed_makes_the_settings_again():
    words = ["--lr", "0.5", "--view1.area", "0.25", "1", "--no-download", "--seed", "3",
             "--no-byol.predictor"]  # fmt: skip
    config = train_byol.configure(words)
    assert config.typed == {"optim.lr": 0.5, "view1.area": [0.25, 1.0], "data.download": False,
                            "run.seed": 3, "byol.predictor": False}  # fmt: skip
    assert train_byol.settings(config.typed) == config


def test_options_of_other_commands_are_checked_and_have_no_flag(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[data]\nlabels = 10\n[run]\nonline_probe = true\n")
    assert not hasattr(train_byol.configure(["--recipe", str(path)]).data, "labels")
    config = train_baseline.configure(["--recipe", str(path)])
    assert config.data.labels == 10 and not hasattr(config.run, "online_probe")
    for script, flag in ((train_byol, "--labels"), (train_baseline, "--knn-every")):
        with pytest.raises(UserError, match=f"unrecognized arguments: {flag}"):
            script.configure([flag, "3"])
    path.write_text("[data]\nlabels = -1\n")
    with pytest.raises(UserError, match="labels = -1: must be at least 0"):
        train_byol.configure(["--recipe", str(path)])


@pytest.mark.parametrize("table, name, instead", [
    ("optim", "max_steps", "use --steps"), ("run", "replicas_every", "compared at each save")
])  # fmt: skip
def test_who_sets_a_removed_option_learns_what_to_do(tmp_path, capsys, table, name, instead):
    flag = f"--{name.replace('_', '-')}"
    for words in ([flag, "5"], [f"{flag}=5"]):
        with pytest.raises(UserError, match=f"{flag}.* was removed: .*{instead}"):
            train_byol.configure(words)
    path = tmp_path / "recipe.toml"
    path.write_text(f"[{table}]\n{name} = 5\n")  # older recipes are read
    train_byol.configure(["--recipe", str(path)])
    error = capsys.readouterr().err
    assert f"{path}: [{table}] {name} was removed" in error and instead in error


def test_epochs_that_are_typed_take_the_place_of_a_recipes_steps(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[optim]\nsteps = 7\nepochs = 2\n")
    recipe = ["--recipe", str(path)]
    assert train_byol.configure(recipe).optim.total_steps(10) == 7
    assert train_byol.configure([*recipe, "--epochs", "3"]).optim.total_steps(10) == 30
    both = ["--epochs", "3", "--steps", "5"]
    assert train_byol.configure([*recipe, *both]).optim.total_steps(10) == 5
    assert train_baseline.configure(["--epochs", "3"]).optim.total_steps(10) == 30


def test_epochs_of_a_recipe_take_the_place_of_the_methods_steps(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("[baseline]\nepochs = 3\n[optim]\nsteps = 7\n[byol]\nepochs = 2\n")
    recipe = ["--recipe", str(path)]
    assert train_baseline.configure(recipe).optim.total_steps(10) == 30
    assert train_byol.configure(recipe).optim.total_steps(10) == 20
    assert train_byol.configure([*recipe, "--steps", "5"]).optim.total_steps(10) == 5
    path.write_text("[baseline]\nepochs = 3\nsteps = 6\n")
    assert train_baseline.configure(recipe).optim.total_steps(10) == 6


def test_differences_are_those_that_shape_the_run():
    saved = as_dict(train_byol.configure([]))
    flags = ["--lr", "0.2", "--byol.base-tau", "0.5", "--log-every", "7", "--out", "x",
             "--threads", "1", "--view2.blur-p", "0.5", "--seed", "3"]  # fmt: skip
    found = differences(train_byol.configure(flags), saved)
    assert found == ["--view2.blur-p 0.1 -> 0.5", "--lr 2.0 -> 0.2", "--seed 0 -> 3",
                     "--byol.base-tau 0.99 -> 0.5"]  # fmt: skip
    assert differences(train_byol.configure([]), saved) == []


def test_the_steps_of_a_run():
    def total(*flags):
        return train_byol.configure(list(flags)).optim.total_steps(10)

    assert total("--epochs", "3") == 30
    assert total("--epochs", "3", "--steps", "7") == 7


@pytest.mark.parametrize("name, epochs, lr, weight_decay, base_tau", [
    ("imagenet", 100, 0.45, 1e-6, 0.99),
    ("stl10", 100, 2.0, 1e-6, 0.99),
    ("stl10_long", 1000, 2.0, 1.5e-6, 0.996),
])  # fmt: skip
def test_a_recipe_has_the_papers_preset_for_its_length(name, epochs, lr, weight_decay, base_tau):
    """The settings for 1000 epochs in a run of 100 are a known mistake, and so is the rate of
    batch 4096 at a sixteenth of it.
    """
    c = train_byol.configure(["--recipe", str(ROOT / "recipes" / f"{name}.toml")])
    assert (c.optim.optimizer, c.optim.epochs, c.optim.warmup_epochs) == ("lars", epochs, 10)
    assert (c.optim.lr, c.optim.weight_decay, c.byol.base_tau) == (lr, weight_decay, base_tau)


@pytest.mark.parametrize("configure", [train_byol.configure, train_baseline.configure])
def test_stl10_recipe_is_the_bare_command(configure):
    path = ROOT / "recipes" / "stl10.toml"
    with_recipe, bare = as_dict(configure(["--recipe", str(path)])), as_dict(configure([]))
    assert with_recipe.pop("recipe") and bare.pop("recipe") == {}
    assert with_recipe.pop("flags").pop("recipe") and bare.pop("flags")["recipe"] == ""
    assert with_recipe == bare


LEAK = """
[optim]
optimizer = "lars"
lr = 2.0
weight_decay = 1e-6
batch_size = 512
steps = 20
warmup_epochs = 10
"""


def test_a_recipes_optim_is_for_pretraining_alone(tmp_path, sample, recipe):
    path = tmp_path / "leak.toml"
    path.write_text(LEAK)
    words = ["--recipe", str(path)]
    assert train_byol.configure(words).optim.lr == 2.0
    own = train_baseline.configure([]).optim
    assert train_baseline.configure(words).optim == own
    assert train_baseline.configure([*words, "--sweep"]).optim == own
    assert (own.optimizer, own.lr, own.steps, own.warmup_epochs) == ("sgd", 0.1, 5000, 0)
    path.write_text(LEAK + "[baseline]\nlr = 0.3\n[finetune]\nsteps = 7\n")
    assert train_baseline.configure(words).optim == dataclasses.replace(own, lr=0.3)
    assert train_baseline.configure([*words, "--lr", "0.4"]).optim.lr == 0.4
    run = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--quiet"]
    train_byol.main(argv=run)
    tuned = finetune.configure(["--ckpt", str(tmp_path / "run"), *words]).optim
    assert (tuned.optimizer, tuned.lr, tuned.steps) == ("sgd", 0.05, 7)
    assert (tuned.nesterov, tuned.batch_size, tuned.warmup_epochs) == (True, 96, 0)
    # the recipe that the run itself was trained by
    inherited = finetune.configure(["--ckpt", str(tmp_path / "run")]).optim
    assert (inherited.optimizer, inherited.weight_decay, inherited.steps) == ("sgd", 0.0, 5)


def test_what_is_tuned_for_one_method_is_no_others_default():
    """In each recipe: a method without a table has its own optimizer, rate and decay."""
    tuned = {"optimizer", "lr", "weight_decay", "nesterov"}
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        words, tables = ["--recipe", str(path)], tomllib.loads(path.read_text())
        assert not tuned & tables["optim"].keys(), path
        for method in (SimSiam, SimCLR, BarlowTwins, VICReg, MoCoV3, DINO):
            if method.name not in tables:
                optim = train_byol.configure(words, method).optim
                for key in tuned & method.defaults["optim"].keys():
                    expected = method.defaults["optim"][key]
                    assert getattr(optim, key) == expected, (path, method.name, key)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_every_recipe_is_valid_for_every_script(path):
    for configure in (train_byol.configure, train_baseline.configure):
        configure(["--recipe", str(path)])
    train_byol.configure(["--recipe", str(path)], SimSiam)


@pytest.mark.parametrize("script", [train_byol, train_baseline, linear_eval])
def test_help_is_printed_with_defaults(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.configure(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--data-root" in text and "[datasets]" in text


def test_any_sign_may_stand_in_a_help_text(capsys):
    @dataclasses.dataclass
    class Table:
        """[table]: one option."""

        share: float = option(0.5, "drop 50 % of it (100%)", low=0)

    config = dataclasses.make_dataclass("C", [("run", Table)], bases=(Config,), kw_only=True)
    with pytest.raises(SystemExit):
        parse(config, ["--help"], "100 %")
    assert "drop 50 % of it (100%) [0.5]" in " ".join(capsys.readouterr().out.split())


def test_a_recipe_without_the_methods_table_is_told(tmp_path, capsys):
    """A subclass with a name of its own does not get what the recipe has for BYOL."""
    path = tmp_path / "recipe.toml"
    path.write_text('[byol]\nbase_tau = 0.5\noptimizer = "sgd"\n')

    class Mine(BYOL):
        name = "mine"

    config = train_byol.settings({"recipe": str(path)}, Mine)
    assert config.method.base_tau == 0.99 and config.optim.optimizer == "lars"
    assert "no table [mine], so its defaults are used" in capsys.readouterr().err
    train_byol.settings({"recipe": str(path)})
    train_byol.settings({"recipe": str(path)}, SimSiam)  # has defaults of its own
    assert capsys.readouterr().err == ""
