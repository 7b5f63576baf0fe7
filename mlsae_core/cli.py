"""What a command line of this project is made of: arguments, modes, errors as one line."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable

from mlsae_core import __version__, stops, store
from mlsae_core.spec import SpecError

EXIT_CODES = """\
Exit codes: 0 done; 2 bad input, which the message names; 1 stopped before the end; 128 and the
signal's number where one came (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP). Training writes a checkpoint
first, and the same command continues from it. `python -X dev -m …` shows where an error was raised.
"""
LONGEST = 1000  # characters of an error's line


class Commands:
    """Commands by name, each with one argument, options of its own and a function to call.

    program: the module that is run. about: what its commands are for. epilog: after the options.
    """

    def __init__(self, program: str, about: str, epilog: str):
        self.parser = argparse.ArgumentParser(
            prog=f"python -m {program}",
            description=about,
            epilog=epilog + EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.add_argument("--version", action="version", version=__version__)
        self._commands = self.parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )

    def add(
        self,
        call: Callable[[argparse.Namespace], None],
        name: str,
        summary: str,
        argument: str,
        about: str,
        mode: bool = True,
        **options,
    ) -> argparse.ArgumentParser:
        """A command; mode: whether it may compute anew, or only read."""
        sub = self._commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(call=call)
        sub.add_argument(argument.lower(), metavar=argument, help=about, **options)
        if mode:
            group = sub.add_mutually_exclusive_group()
            group.add_argument("--force", action="store_true", help="compute this stage anew, "
                               "into data/store; the book still reads shipped results")  # fmt: skip
            group.add_argument("--read-only", action="store_true", help="compute nothing; fail on "
                               "a missing result and name the nearest one")  # fmt: skip
        return sub

    @property
    def names(self) -> list[str]:
        """Of the commands there are."""
        return list(self._commands.choices)

    def run(self, arguments: list[str] | None = None) -> int:
        """Run one command; 0 when done, 2 for bad input, 1 for anything that stopped the work."""
        options = self.parser.parse_args(arguments)
        # Before these are there.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            with stops.raised():
                options.call(options)
        except KeyboardInterrupt as stop:
            said = "interrupted; the same command continues with what is not finished yet"
            print(line(str(stop) or said), file=sys.stderr)
            return 128 + getattr(stop, "number", signal.SIGINT)
        except Exception as error:  # the one boundary: of our kinds and all other libraries'
            if sys.flags.dev_mode:
                raise
            known = isinstance(error, SpecError | store.Stopped | OSError)
            said = str(error) if known else f"{type(error).__name__}: {error}"
            print(f"error: {line(said)}", file=sys.stderr)
            long = isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG
            return 2 if long or isinstance(error, SpecError) else 1
        return 0


def line(message: str) -> str:
    """A message on one line: control characters escaped, and cut where it is too long."""
    joined = " ".join(message.split())
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined[:LONGEST]
    )
    return shown if len(joined) <= LONGEST else f"{shown} …"


def mode(options: argparse.Namespace) -> str:
    """What `pipeline.Session` may compute."""
    return "force" if options.force else "read-only" if options.read_only else "cached"


def show(table):
    """Print a table without its index."""
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
