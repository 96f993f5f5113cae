"""The line of one command, read by argparse; and the list of all commands.

Making the parsers of all commands would take longer than most commands do, so only that of the
command which was asked for is made.

argparse reads lines in its own way: of GUEST [NAME], `vm1 --restart NAME` leaves NAME over; a value
can't begin with a dash; and every positional loses a `--` (3.11), also that of `git checkout --
FILE`. So the words are parted here, as getopt does it: options may stand anywhere before `--`, and
what is left is positional. argparse gets `OPTIONS -- POSITIONALS`, where nothing is open.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from netorch.cli_options import ANY_COMMAND, Command, argument
from netorch.errors import UsageError

_HELP = argument("-h", "--help", action="help", help="Show this message and exit.")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=_width())  # else it imports shutil


class _Parser(argparse.ArgumentParser):
    def error(self, message: str, near: str = "") -> NoReturn:
        self.print_usage(sys.stderr)
        raise UsageError(message, f"{near}try '{self.prog} --help'")


def parsed(command: Command, words: Sequence[str]) -> dict[str, Any]:
    """The parameters of `command.run`. Raises UsageError, the usage shown; exits after --help."""
    parser = _parser(command)
    options, positionals = _parted(parser, command, words)
    found, extra = parser.parse_known_args([*options, "--", *positionals])
    if extra and extra != ["--"]:
        parser.error(f"{extra[-1]!r} is one argument too many")
    return vars(found)


def overview(commands: Iterable[Command]) -> str:
    """What `netorch --help` shows."""
    from textwrap import shorten

    rows = [("--version", "Show the version and exit."), ("-h, --help", str(_HELP[1]["help"]))]
    lines = ["usage: netorch COMMAND [OPTIONS] [ARGUMENTS]", ""]
    lines += ["One TOML file becomes a running QEMU network lab, and goes away without a trace."]
    lines += ["", "options:", *(f"  {names:10}  {text}" for names, text in rows), "", "commands:"]
    for command in sorted(commands, key=lambda command: command.name):
        sentence = command.help.split(". ")[0].rstrip(".") + "."
        lines.append(f"  {command.name:10}  {shorten(sentence, _width() - 14, placeholder='...')}")
    return "\n".join([*lines, "", "`netorch COMMAND --help` says more of each."])


def near(word: str, known: Iterable[str]) -> str:
    """A question about what may be meant, or nothing."""
    import difflib  # costs 8 ms

    names = list(known)
    close = [name for name in names if name.startswith(word)]
    close = close or difflib.get_close_matches(word, names)
    return f"did you mean {' or '.join(close)}? " if close else ""


def _parser(command: Command) -> _Parser:
    prog = f"netorch {command.name}"
    shown = [how["metavar"] for names, how in command.arguments if names[0][0] != "-"]
    parser = _Parser(
        prog=prog,
        usage=" ".join((prog, "[OPTIONS]", *shown)),
        description=command.help,
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    for names, how in (*command.arguments, _HELP):
        made = parser.add_argument(*names, **how)
        if how.get("nargs") in (ANY_COMMAND, "*"):
            made.required = False  # argparse would name it where another one is missing
    return parser


def _parted(parser: _Parser, command: Command, words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Options, each with its value as one word, and positionals."""
    options: list[str] = []
    positionals: list[str] = []
    arguments = (*command.arguments, _HELP)
    named = ((name, how) for names, how in arguments for name in names if name[0] == "-")
    takes_value = {name: "action" not in how for name, how in named}
    left = iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if word == "--":
            positionals.extend(left)
        elif word == "-" or not word.startswith("-"):
            positionals.append(word)
        elif name in takes_value:
            value = next(left, None) if takes_value[name] and not equals else None
            options.append(word if value is None else f"{word}={value}")
        elif command.passes_on:
            positionals.append(word)
        else:
            bare = name.lstrip("-")
            is_argument = any(names == (bare,) for names, _how in arguments)
            meant = f"give the {bare} without {name!r}; " if is_argument else ""
            parser.error(f"there is no option {name!r}", meant or near(name, takes_value))
    return options, positionals


def _width() -> int:
    """Of the text: that of the terminal, and not more than reads well."""
    try:
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns)
    except (ValueError, OSError):
        columns = 0
    return max(40, min(columns or 80, 100)) - 2
