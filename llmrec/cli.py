"""The command line: `llmrec COMMAND [--config FILE ...] [--key.sub value ...]`.

Settings come from, each over the one before: defaults, the recipes named by --dataset, --retriever, --recipe and
--ranker, `--config` files in their order, options. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from llmrec import distributed, process, resources
from llmrec.config import Config
from llmrec.errors import StageFailed, UserError
from llmrec.stages import RECIPES, STAGES, recipe_files_of

SUMMARY = {
    "prepare": "raw files -> interactions, items and users, split in training, validation and test",
    "retrieve": "train a retriever and write every user's top candidates",
    "pairs": "build prompts, SFT rows and preference pairs from the training part",
    "sft": "fine-tune the language model to answer with the next item",
    "orpo": "tune it on preference pairs with ORPO",
    "evaluate": "rank the candidates of the test users, compare, and write report.html",
    "order": "does order matter here? ask a retriever about the same histories shuffled and reversed",
    "bench": "time finished retrievers and language models: seconds per user with intervals, memory, parameters",
    "export": "write the tuned ranker as a folder to hand on: the adapter, or (--merged) the whole model",
    "report": "make the report of one run again, or one page about several",
    "audit": "look for leaks in a run and all it rests on, one line per check; exit code 1 when there is one",
    "compare": "finished runs side by side, with tests, and only if they were measured alike",
    "check-table": "find the rows of a table of results that no ranking can have given",
    "runs": "list what exists, with its headline metric",
    "doctor": "print versions, devices, kernels and caches, and what is missing",
}
set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the texts under the settings of config.py are their help

FIELDS = [field.name for field in fields(Config)]
HEAD_START = 3.0  # seconds in which the launcher ends all processes after one has failed


def entry() -> None:
    """The `llmrec` program."""
    if distributed.launched():
        process.die_with_parent()  # the launcher
    if sys.argv[1:2] and sys.argv[1] in STAGES:
        process.restart()
    code = main()
    if code == 0:
        distributed.leave()
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command and arguments; those of the process when None.

    Returns:
        0 when all went well, 1 when `audit` or `check-table` found something, 2 for a mistake the user can mend (one line on stderr).
    """
    arguments = sys.argv[1:] if argv is None else argv
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    try:
        if command == "--version":
            from llmrec import __version__

            print(__version__)
        elif command in STAGES:
            _stage(command, arguments[1:])
        elif command in SUMMARY:
            return _inspect(command, arguments[1:])
        else:
            near = difflib.get_close_matches(command, SUMMARY, n=1)
            raise UserError(f"unknown command '{command}'{f', did you mean {near[0]}?' if near else ''} The commands: {', '.join(SUMMARY)}")
    except UserError as error:
        _complain(f"llmrec {command}" if command in SUMMARY else "llmrec", error)
        return 2
    except StageFailed as failed:
        return failed.code
    except Exception:
        if distributed.world_size() > 1:  # most likely another process has failed, and its message is the one to read
            time.sleep(HEAD_START)
        raise
    except KeyboardInterrupt:
        print(f"llmrec {command}: interrupted. Run the same command again: it goes on from its last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _complain(name: str, error: UserError) -> None:
    """One line on stderr. Where all processes stumble over the same, rank 0 speaks and the launcher ends the others meanwhile."""
    if not distributed.is_main():
        time.sleep(HEAD_START)
        name = f"{name} (process {distributed.rank()} of {distributed.world_size()})"
    print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _overview() -> str:
    lines = [f"  {name:<13}{text}" for name, text in SUMMARY.items()]
    return "\n".join(
        [
            "usage: llmrec COMMAND [--config FILE ...] [--key value ...]",
            "",
            "Retrieve candidates with a fast sequence model, rank them with a language model tuned on preferences,",
            "and measure what each step bought. Commands, in the order in which they build on each other:",
            "",
            *lines,
            "",
            "`llmrec COMMAND --help` lists a command's settings with the values its recipes give them.",
            "`llmrec evaluate --chain` runs everything it needs first.",
        ]
    )


def _inspect(command: str, arguments: list[str]) -> int:
    from llmrec.inspection import COMMANDS

    its = COMMANDS[command]
    parser = ArgumentParser(prog=f"llmrec {command}", description=its.teaches or SUMMARY[command], exit_on_error=False, allow_abbrev=False)
    its.add_arguments(parser)
    answer, code = its.run(_parse(parser, arguments))
    print(json.dumps(answer))
    return code


def _stage(command: str, arguments: list[str]) -> None:
    config, options = read_settings(command, arguments)
    from llmrec.stages import execution

    launcher = execution.launcher(options.accelerate, options.processes)
    if launcher and not options.chain:
        raise UserError("--accelerate goes with --chain; one stage alone: accelerate launch --config_file FILE -m llmrec ...")
    if options.dry_run:
        outcome = execution.dry_run(command, config, force=options.force, chained=options.chain)
    elif options.chain:
        outcome = execution.chain(command, config, force=options.force, launcher=launcher)
    else:
        outcome = execution.one(command, config, force=options.force)
    if distributed.is_main():
        print(json.dumps(outcome))


def read_settings(command: str, arguments: list[str]) -> tuple[Config, Namespace]:
    """Parse a stage command's arguments over its recipes.

    Returns:
        The settings, and the options `dry_run`, `force`, `chain`, `accelerate` and `processes`.

    Raises:
        UserError: for an unknown option or a value that does not fit; it names the nearest option.
    """
    parser = _parser(command)
    shown = [argument for argument in arguments if argument not in ("-h", "--help") and not argument.startswith("--print_config")]
    names = _to_config(_parse(parser, shown, command), parser, command)
    for content in _recipes(names, command, parser):
        parser.set_defaults(_flat(content, Config))
    options = _parse(parser, arguments, command)
    return _to_config(options, parser, command), options


def _flat(content: dict[str, Any], section: type, prefix: str = "") -> dict[str, Any]:
    """Nested settings of a section by dotted name; an optional section (a wheel) is one setting."""
    kinds = get_type_hints(section)
    flat: dict[str, Any] = {}
    for key, value in content.items():
        inner = kinds[key]
        nested = isinstance(inner, type) and is_dataclass(inner)
        flat |= _flat(value, inner, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _parser(command: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"llmrec {command}",
        usage=f"llmrec {command} [--config FILE ...] [--key value ...]",
        description=SUMMARY[command],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a yaml file of settings; may be given several times, later ones win")
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, what is up to date and what it costs")
    parser.add_argument("--force", action="store_true", help="make the run folder again, though it is finished or was made differently")
    parser.add_argument("--chain", action="store_true", help="first run the stages this one needs; those up to date are skipped")
    parser.add_argument(
        "--accelerate", help="with --chain: share stages among processes as this file of recipes/accelerate says, or a path"
    )
    parser.add_argument("--processes", type=int, help="with --accelerate: how many, in place of what the file says")
    options = STAGES[command].options
    parser.add_class_arguments(Config, skip={name for name in FIELDS if name not in options or name == "merged"}, as_group=False)
    if "merged" in options:  # a flag, like those above
        parser.add_argument("--merged", action="store_true", help="the whole model with the adapter in its weights")
    return parser


def _to_config(options: Namespace, parser: ArgumentParser, command: str) -> Config:
    values = vars(parser.instantiate(options))
    return Config(**{name: values[name] for name in STAGES[command].options})


def _recipes(names: Config, command: str, parser: ArgumentParser) -> list[dict[str, Any]]:
    """The settings in the named recipes that this command knows, in the order of precedence."""
    found = []
    for kind, name in recipe_files_of(names, STAGES[command].options).items():
        path = resources.find(kind, name)
        content = resources.read_yaml(path)
        for key in content:
            if key not in FIELDS or key in RECIPES:
                raise UserError(f"{path}: unknown key '{key}'{_nearest(key, FIELDS)}")
        content = {key: value for key, value in content.items() if key in STAGES[command].options}
        try:
            _parse(parser, ["--config", yaml.safe_dump(content)], command)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        found.append(content)
    return found


def _parse(parser: ArgumentParser, arguments: list[str], command: str | None = None) -> Namespace:
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        message = str(error)
        unknown = _unknown_key(message)
        known = [name for action in parser._actions for name in [action.dest] if name]
        raise UserError(f"unknown option '{unknown}'{_nearest(unknown, known)}" if unknown else message) from error


def _unknown_key(message: str) -> str | None:
    patterns: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"unrecognized arguments: --([^\s=]+)", lambda m: m[1]),
        (r"[Gg]roup '([^']+)' does not accept option '([^']+)'", lambda m: f"{m[1]}.{m[2]}"),
        (r"[Oo]ption '([^']+)' is not accepted", lambda m: m[1]),
    ]
    for pattern, name in patterns:
        if match := re.search(pattern, message):
            return name(match)
    return None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean '{near[0]}'?" if near else f"; the keys are {', '.join(sorted(known)[:40])}"


def stage_function(command: str) -> Callable[..., Any]:
    """The function of a stage, imported when it is needed."""
    return vars(importlib.import_module(f"llmrec.stages.{command}"))[command]
