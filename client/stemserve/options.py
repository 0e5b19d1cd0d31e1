"""Options that several commands have, stated once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

_Command = Callable[..., Any]

_OPTIONS: Final = (
    click.option(
        "--url",
        envvar="STEMSERVE_URL",
        metavar="HOST:PORT",
        help="Triton's gRPC address. Without it a local server is started for this command.",
    ),
    click.option("--model", metavar="NAME", help="Model; may be left out if there is only one."),
    click.option(
        "--repository",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Model repository of the local server.",
    ),
    click.option(
        "--shared-memory",
        is_flag=True,
        help="Hand samples over through /dev/shm, for a --url on this machine. A local server that "
        "is started for this command is called so anyway.",
    ),
    click.option(
        "--overlap",
        type=float,
        metavar="SHARE",
        help="Share of a chunk in common with the next, e.g. 0.25. [default: the model's]",
    ),
    click.option(
        "--shifts",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Average over N passes with random delays: better, and N times the work.",
    ),
    click.option("--shift-seed", type=int, default=0, metavar="SEED", help="Seed of the delays."),
)


def separation_options(command: _Command) -> _Command:
    """Add the options of a command that separates: what serves, and how chunks are joined.

    Passed on as ``url``, ``model``, ``repository``, ``shared_memory``, ``overlap``, ``shifts`` and
    ``shift_seed``.
    """
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
