"""Every command of the README parses, and every file and flag that it names exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import SCRIPTS
from torch.distributed.run import get_args_parser

README = (SCRIPTS / "README.md").read_text()
COMMANDS = re.findall(r"python (?:tools/)?(\w+)\.py ([^\n`|&]*)", README)


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_command_parses(script, arguments):
    module = importlib.import_module(script)
    arguments = shlex.split(arguments)
    if script == "train":
        module.parse_args(arguments)
    else:
        module.build_parser().parse_args(arguments)


@pytest.mark.parametrize("line", re.findall(r"torchrun (--[^\n`]* train\.py [^\n`]*)", README))
def test_torchrun_command_parses(line):
    words = [word for word in shlex.split(line) if word != "$resume"]
    args = get_args_parser().parse_args(words)
    assert args.training_script == "train.py"
    args, state = importlib.import_module("train").parse_args(args.training_script_args)
    assert state is None
    assert args.batch_size < 8  # on each of several devices


def test_there_are_commands():
    scripts = {"prepare_masks", "train", "evaluate", "predict", "benchmark"}
    assert {script for script, _ in COMMANDS} == scripts


def test_flags_in_tables_exist():
    for script, flags in re.findall(r"`(\w+)\.py ((?:--[\w-]+ ?)+)`", README):
        known = importlib.import_module(script).build_parser().format_help()
        for flag in flags.split():
            assert re.search(rf"{flag}\b", known), flag


@pytest.mark.parametrize(
    "script", ["prepare_masks", "train", "evaluate", "predict", "demo", "benchmark"]
)
def test_help_shows_an_example_that_parses_and_the_defaults(script):
    parser = importlib.import_module(script).build_parser()
    example = shlex.split(parser.epilog.removeprefix("example: python "))
    assert Path(example[0]).name == f"{script}.py"
    parser.parse_args(example[1:])
    assert "(default: " in parser.format_help()


def test_files_and_make_targets_exist():
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (SCRIPTS / name).exists(), name
    targets = (SCRIPTS / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in targets
    assert Path(SCRIPTS / ".ci" / "run").exists()
