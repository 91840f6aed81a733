"""The command ``parvts-fx``: what pruning does to a model of one's own, without writing a line (docs/command.md).

Results go to standard output; progress, and one line where something is wrong, to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from parvts_fx.command.arguments import parser
from parvts_fx.command.errors import BadInput, first_line, quietly


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those behind the command's name; None for those of the process.

    Returns:
        what the process exits with: 0, or 1 where something that was given cannot be used (one line on standard error says
        what); 130 where it was interrupted.

    Raises:
        SystemExit: 2 for arguments that make no sense, also with one line; 0 behind ``--help``.
        Exception: with ``--traceback``, whatever went wrong.
    """
    given = parser().parse_args(arguments)
    try:
        with quietly():
            return given.run(given)
    except KeyboardInterrupt:
        return 130
    except (BadInput, ValueError, ImportError, OSError, RuntimeError) as error:
        if given.traceback:
            raise
        print(f"parvts-fx {given.command}: {first_line(error)}", file=sys.stderr)
        return 1
