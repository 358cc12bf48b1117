"""The `fuse` command: finds the subcommand, parses its options, and turns users' errors into one line each.

A command is a module with `add_arguments(parser)` and `run(arguments) -> exit status`; it is imported only when it
runs, so `fuse --help` loads neither torch nor ray. Its `parents(argv)`, if any, are parsers whose options it takes.

Exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NoReturn

import fuse
from fuse.garbage import collect_rarely
from fuse.options_file import OPTION as CONFIG_OPTION
from fuse.options_file import with_config_file
from fuse.printable import printable
from fuse.termination import Terminated

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "train": "train a policy by PPO, GRPO, RLOO, REINFORCE++ or online DPO on your prompts",
        "recipe": "from preference data to an aligned model: fine-tuning, reward model, reinforcement learning",
        "rehearsal": "choose examples for a policy to rehearse: the best of clusters",
        "chat": "talk to a model",
        "demo": "teach a small model to add, from nothing, in a few minutes",
        "plan": "say what a run holds in memory on each device, and whether it fits",
        "solve": "find a fused pipeline schedule",
        "show": "print or draw a run, one of its traces, or a schedule",
        "watch": "serve the page of a run while it goes on",
        "simulate": "replay recorded response lengths under migration policies",
    }
)
BENCHMARKS: Mapping[str, str] = MappingProxyType(
    {
        "iteration": "whole PPO iterations",
        "rollout": "rollouts under each migration policy, and generation by itself",
        "migration": "the pause of a sample that moves between engines",
        "speculation": "drafts against plain decoding",
        "tail": "updates without and with what shortens and fills the long tail, simulated",
        "training": "pipeline training of actor and critic",
        "stabilisers": "what a recipe's options against going too far do",
        "solver": "schedule search",
        "kernels": "native kernels against their torch references",
        "gpu": "what only a GPU can show, checked without Ray",
    }
)
RUN_ERRORS: Mapping[str, str] = MappingProxyType(
    {
        "fuse.workers.errors": "RunError",
        "fuse.trainers.rewards": "RewardError",
        "fuse.checkpoint": "SaveError",
        "fuse.recipe.steps": "StepError",
    }
)
"""What ends a run that the input is not to blame for: errors by the module that defines them."""
EARLY_CHECKS: Mapping[str, str] = MappingProxyType({"train": "fuse.commands.train_paths"})
"""Modules by the command whose options their `check(argv)` looks at while that is not imported, which takes seconds."""
OK, RUN_FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
TRACEBACK_VARIABLE = "FUSE_TRACEBACK"
_MOST_COLUMNS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status; bad options exit with status 2 by SystemExit."""
    collect_rarely()
    name, module, rest = _select(list(sys.argv[1:] if argv is None else argv))
    try:
        rest = with_config_file(rest)
        if name in EARLY_CHECKS:
            import_module(EARLY_CHECKS[name]).check(rest)
        command: Any = import_module(module)
        parser = Parser(
            prog=f"fuse {name}",
            description=command.__doc__,
            parents=command.parents(rest) if hasattr(command, "parents") else [],
            formatter_class=HelpFormatter,
        )
        parser.add_argument(CONFIG_OPTION, metavar="FILE", help="YAML file of options; those beside it win")
        command.add_arguments(parser)
        return int(command.run(parser.parse_args(rest)))
    except KeyboardInterrupt as interrupt:
        return _fail(name, str(interrupt) or "interrupted", INTERRUPTED)
    except Terminated as termination:
        return _fail(name, termination, TERMINATED)
    except _run_errors() as error:
        return _fail(name, error, RUN_FAILED)
    except (ValueError, OSError) as error:
        return _fail(name, error, BAD_INPUT)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes --num_devices for --num-devices, and answers a mistake with one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        arguments = [_with_dashes(argument) for argument in (sys.argv[1:] if args is None else args)]
        parsed, unknown = super().parse_known_args(arguments, namespace)
        if unknown:
            self.error(self._unknown_option(unknown[0]))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {_one_line(message)} ({self.prog} --help lists the options)\n")

    def _unknown_option(self, text: str) -> str:
        if not text.startswith("-"):
            return f"unexpected argument {text!r}: remove it, or give the option that it belongs to"
        name = text.partition("=")[0]
        close = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"unknown option {name}" + (f": did you mean {_with_dashes(close[0])}?" if close else "")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lists each option once, in its dashed spelling."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(name for name in action.option_strings if "_" not in name)
        if action.nargs == 0:
            return names
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def _select(argv: list[str]) -> tuple[str, str, list[str]]:
    """Split a command line into the command's name, its module, and its arguments."""
    commands = {name: text for name, text in COMMANDS.items() if _exists(f"fuse.commands.{name}")}
    benchmarks = {name: text for name, text in BENCHMARKS.items() if _exists(f"fuse.benchmarks.{name}")}
    if benchmarks:
        commands["bench"] = f"measure: {', '.join(benchmarks)}"
    command, rest = _choose("fuse", fuse.__doc__, commands, argv)
    if command != "bench":
        return command, f"fuse.commands.{command}", rest
    benchmark, rest = _choose("fuse bench", "Measure one part on this machine.", benchmarks, rest)
    return f"bench {benchmark}", f"fuse.benchmarks.{benchmark}.command", rest


def _choose(prog: str, description: str | None, choices: Mapping[str, str], argv: list[str]) -> tuple[str, list[str]]:
    """Take the first argument as one of `choices`, and leave the others alone."""
    width = max(map(len, choices), default=0)
    lines = [f"  {name:{width}}  {text}" for name, text in choices.items()]
    parser = Parser(
        prog=prog,
        description=description,
        usage=f"{prog} COMMAND [OPTIONS]",
        epilog="\n".join(
            ["commands:", *lines, "", f"`{prog} COMMAND --help` lists a command's options.", *_environment_help(prog)]
        ),
        formatter_class=HelpFormatter,
    )
    if prog == "fuse":
        parser.add_argument("--version", action="version", version=f"fuse {fuse.__version__}")
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)
        parser.error("no command given: use " + ", ".join(choices))
    if argv[0] not in choices:
        close = difflib.get_close_matches(argv[0], choices, n=1)
        hint = f"did you mean {close[0]}?" if close else "use " + ", ".join(choices)
        parser.error(f"unknown command {argv[0]!r}: {hint}")
    return argv[0], argv[1:]


def _environment_help(prog: str) -> list[str]:
    return [f"{TRACEBACK_VARIABLE}=1 shows the traceback of an error."] if prog == "fuse" else []


def _exists(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return find_spec(parent) is not None and find_spec(module) is not None


def _with_dashes(argument: str) -> str:
    """`--num_devices=2` -> `--num-devices=2`; what is no option stays as it is."""
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value if re.fullmatch(r"--\w[\w-]*", name) else argument


def _run_errors() -> tuple[type[BaseException], ...]:
    """Those of RUN_ERRORS whose modules the command has loaded; importing them here would load torch and ray."""
    loaded = [(sys.modules.get(module), name) for module, name in RUN_ERRORS.items()]
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


def _fail(command: str, error: BaseException | str, status: int) -> int:
    if os.environ.get(TRACEBACK_VARIABLE) and isinstance(error, BaseException):
        raise error
    print(f"fuse {command}: {_one_line(str(error)) or type(error).__name__}", file=sys.stderr)
    return status


def _one_line(text: str) -> str:
    """Short enough to read, and nothing in it that a terminal obeys."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _MOST_COLUMNS else f"{line[:_MOST_COLUMNS]} ..."
