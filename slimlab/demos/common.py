"""How a demo starts: under mpirun, under torchrun, or by itself; and how it ends.

A demo is a plain `program(comm, ...)` that returns a report, and `main`, a command made of it by
`demo_command`. Under a launcher every rank runs `main`, connects and runs the program; without one
`main` starts the ranks with run_ranks. Rank 0 prints, and all end with the same exit code: 0 if
everything measured fits what was predicted, 1 if not, 2 if the command line asked for what cannot
be. Production programs know one launcher, and end with 0 as long as nothing raises.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module

import click

from slimlab.comm.connect import connect
from slimlab.comm.launch import BACKENDS, run_ranks
from slimlab.comm.launchers import Launcher, launcher_of, rank_in
from slimlab.comm.report import CommunicationError
from slimlab.config import InputError, require
from slimlab.demos.report import Report

RANKS = 4
TIMEOUT_S = 60.0
LEAVE_LATER_S = 3.0


class DemoCommand(click.Command):
    """A command whose errors are messages, shown once however many ranks run it."""

    def invoke(self, ctx: click.Context):
        """Run the command in `ctx`; exit with 2 for an InputError, 1 for failed communication."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a pipe may know no micro seconds
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would take it for an ordinary end, at which the ranks wait for each other.
            if launcher_of(os.environ).kind != "alone":
                sys.excepthook(*sys.exc_info())
            raise
        except (InputError, CommunicationError) as error:
            # Under a launcher the watch of the ranks reports it, under slimlab the group.
            if ctx.parent is not None or launcher_of(os.environ).kind != "alone":
                raise
            click.echo(f"{self.name}: {error}", err=True)
            ctx.exit(2 if isinstance(error, InputError) else 1)


def demo_command(
    program: Callable[..., Report],
    *options: Callable,
    ranks: int = RANKS,
    least: int = 1,
    check: Callable[..., None] | None = None,
) -> DemoCommand:
    """Make the command of a demo; its name and its help come from the program's module.

    program  a function of a communicator and settings, which returns a Report, the same on every
             rank; the settings are named as the options are
    options  of its own, made by slimlab.demos.common.number
    ranks    how many to start where nobody says
    least    how many it needs
    check    a function of the number of ranks and the settings, which raises InputError where they
             do not fit; called before a rank is started or connected, where their number is known
    """
    module = inspect.getmodule(program)
    name = os.path.splitext(os.path.basename(inspect.getfile(program)))[0]
    names = list(inspect.signature(program).parameters)[1:]

    def run(ranks, backend, timeout_s, as_json, **settings) -> None:
        args = tuple(settings[one] for one in names)
        report, prints = run_demo(
            program,
            args,
            world_size=ranks,
            backend=backend,
            timeout_s=timeout_s,
            default=default_ranks,
            least=least,
            check=check,
        )
        if prints:
            click.echo(report.text())
            if as_json:
                click.echo(report.json())
        sys.stdout.flush()
        sys.exit(0 if report.agrees else 1)

    default_ranks = ranks
    common = [
        number("--ranks", int, None, f"How many; default: {ranks}, or what the launcher started."),
        click.option("--backend", type=click.Choice(BACKENDS),
                     help="Default: threads, or what the launcher connects."),
        number("--timeout", click.FloatRange(0.1, 86_400), TIMEOUT_S,
               "Seconds until ranks that wait are ended.", "timeout_s"),
        click.option("--json", "as_json", is_flag=True, help="End with a line of JSON."),
    ]  # fmt: skip
    for one in reversed([*options, *common]):
        run = one(run)
    text = help_text(module.__doc__)
    settings = {"help_option_names": ["-h", "--help"]}
    return click.command(name, cls=DemoCommand, help=text, context_settings=settings)(run)


def run_demo(
    program: Callable[..., Report],
    args: tuple,
    *,
    world_size: int | None,
    backend: str | None,
    timeout_s: float,
    default: int = RANKS,
    least: int = 1,
    check: Callable[..., None] | None = None,
) -> tuple[Report, bool]:
    """Run a demo's program on all ranks, whoever starts them.

    program     of the demo
    args        its settings
    world_size  number of ranks asked for; None: any that a launcher has started, else the default
    backend     asked for; None: what the launcher connects, else threads
    timeout_s   until ranks that wait are ended
    default     number of ranks to start where nobody says
    least       how many the program needs
    check       as in demo_command
    returns     its report, and whether this process is to print it

    Ends this process with exit code 2 if a launcher has started other ranks than those asked for,
    or such as do not fit.
    Raises what run_ranks, connect and check raise.
    """
    launcher = launcher_of(os.environ)
    if launcher.kind == "alone":
        world_size = default if world_size is None else world_size
        _check_least(world_size, least)
        if check is not None:
            check(world_size, *args)
        reports = run_ranks(
            program, world_size, backend=backend or "threads", timeout_s=timeout_s, args=args
        )
        return reports[0], True
    try:
        _check_backend(backend, launcher)
        if launcher.world_size is not None:
            _check_ranks(launcher.world_size, world_size, least, launcher)
            if check is not None:
                check(launcher.world_size, *args)
    except InputError as error:
        _refuse(error, launcher)
    comm = connect(timeout_s, backend=backend)
    _check_ranks(comm.world_size, world_size, least, launcher)
    if check is not None:
        check(comm.world_size, *args)
    return program(comm, *args), comm.rank == 0


def number(name: str, kind: type, default: object, text: str, setting: str | None = None):
    """Make an option that takes a number and shows its default.

    name     as it is typed
    kind     int or float
    default  None shows none
    text     what it means
    setting  what the program calls it; None: as it is typed
    """
    names = (name,) if setting is None else (name, setting)
    shown = default is not None
    return click.option(*names, type=kind, default=default, show_default=shown, help=text)


def help_text(docstring: str) -> str:
    """Turn the docstring of a demo into the help of its command: lines of examples stay lines.

    docstring  of its module
    """
    blocks = docstring.strip().split("\n\n")
    return "\n\n".join("\b\n" + block if block.startswith("    ") else block for block in blocks)


def load_demo(name: str) -> DemoCommand:
    """Import a demo and return its command.

    name  of a module in slimlab.demos
    """
    return import_module(f"slimlab.demos.{name}").main


def _check_least(world_size: int, least: int) -> None:
    require(
        world_size >= least,
        f"at least {least} rank" + "s" * (least > 1),
        f"{world_size}",
        f"start more: --ranks {max(least, 2)}",
    )


def _check_ranks(started: int, wanted: int | None, least: int, launcher: Launcher) -> None:
    require(
        wanted in (None, started),
        f"--ranks {wanted}",
        f"{launcher.name} has started {started}",
        f"leave --ranks out, or let the launcher start {wanted}",
    )
    _check_least(started, least)


def _check_backend(wanted: str | None, launcher: Launcher) -> None:
    connected = ("mpi",) if launcher.kind == "mpi" else ("gloo", "nccl")
    require(
        wanted is None or wanted in connected,
        f"--backend {wanted}",
        f"{launcher.name}, which connects ranks by {' or '.join(connected)}",
        "leave --backend out; threads need no launcher, mpi needs mpirun or srun, gloo and nccl "
        "need torchrun",
    )


def _refuse(error: InputError, launcher: Launcher) -> None:
    """Say what is wrong on the first rank, and end this one; nobody is connected yet."""
    rank = int(os.environ["RANK"]) if launcher.kind == "torch" else rank_in(os.environ)
    if rank == 0:
        click.echo(str(error), err=True)
    else:
        # A launcher ends all ranks when one has ended: the first must have spoken before.
        time.sleep(LEAVE_LATER_S)
    sys.exit(2)
