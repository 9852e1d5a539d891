"""Every command of the README and RESULTS parses, and every file and flag that they name exists."""

import importlib
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import SCRIPTS
from torch.distributed.run import get_args_parser

README = (SCRIPTS / "README.md").read_text()
PAGES = README + (SCRIPTS / "RESULTS.md").read_text()
COMMANDS = re.findall(r"python (?:tools/)?(\w+)\.py ([^\n`|&]*)", PAGES)
MODULES = ["prepare_masks", "train", "evaluate", "predict", "demo", "benchmark", "overfit"]
MODULES += ["export", "coverage", "recipe", "restarts"]


def parses(script, arguments):
    module = importlib.import_module(script)
    if script == "train":
        module.parse_args(arguments)
    else:
        module.build_parser().parse_args(arguments)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Not where runs/ may hold what a user has trained."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_command_parses(script, arguments):
    parses(script, shlex.split(arguments))


@pytest.mark.parametrize("line", re.findall(r"torchrun (--[^\n`]* train\.py [^\n`]*)", README))
def test_torchrun_command_parses(line):
    words = [word for word in shlex.split(line) if word != "$resume"]
    args = get_args_parser().parse_args(words)
    assert args.training_script == "train.py"
    args, state = importlib.import_module("train").parse_args(args.training_script_args)
    assert state is None
    assert args.batch_size < 8  # on each of several devices


def test_there_are_commands():
    assert {script for script, _ in COMMANDS} == set(MODULES) - {"demo"}


def test_flags_in_tables_exist():
    for script, flags in re.findall(r"`(\w+)\.py ((?:--[\w-]+ ?)+)`", README):
        known = importlib.import_module(script).build_parser().format_help()
        for flag in flags.split():
            assert re.search(rf"{flag}\b", known), flag


@pytest.mark.parametrize("script", MODULES)
def test_help_shows_examples_that_parse_and_the_defaults(script):
    module = importlib.import_module(script)
    shown = module.build_parser().format_help()
    examples = re.findall(rf"^    python (?:tools/)?{script}\.py (.*)", shown, re.MULTILINE)
    assert examples
    for example in examples:
        if "--resume" not in example:  # there is no such run
            parses(script, shlex.split(example))
    assert "(default: " in shown


def test_files_and_make_targets_exist():
    for name in re.findall(r"`([\w/]+\.py)`", PAGES):
        assert (SCRIPTS / name).exists(), name
    targets = (SCRIPTS / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in targets
    assert Path(SCRIPTS / ".ci" / "run").exists()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_nothing_is_installed_that_has_known_holes():
    """What the README names as the oldest stands in requirements.txt, and nothing is older here."""
    floors = dict(re.findall(r"(Python|torch|Pillow|wandb) (\d+\.\d+)", README))
    assert set(floors) == {"Python", "torch", "Pillow", "wandb"}
    requirements = (SCRIPTS / "requirements.txt").read_text()
    for name, floor in floors.items():
        oldest = tuple(map(int, floor.split(".")))
        if name == "Python":
            assert sys.version_info >= oldest
            continue
        assert f"{name.lower()}>={floor}\n" in requirements
        installed = re.findall(r"\d+", version(name))
        assert tuple(map(int, installed[:2])) >= oldest, f"{name} {version(name)}"
