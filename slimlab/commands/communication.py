"""`slimlab demo` and `slimlab calibrate`: programs of many ranks, and what messages cost here.

Chapter 07 uses them. Production clusters have such programs too (nccl-tests, OSU benchmarks), and
run them before every large job.
"""

import ast
import json
from dataclasses import asdict
from pathlib import Path

import click

from slimlab.config import check_choice

# In the order in which the chapters use them.
DEMOS = (
    "hello",
    "ping_pong",
    "ring_all_reduce",
    "collectives",
    "dialled_network",
    "data_parallel",
    "zero",
    "tensor_parallel",
    "pipeline",
    "hybrid",
    "slim",
)
BACKENDS = ("threads", "gloo", "mpi", "nccl")


class Demos(click.Group):
    """A group with one command per module of slimlab.demos, which is imported when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all demos; `ctx` is not read."""
        return list(DEMOS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Import the demo `cmd_name`; `ctx` is not read.

        Raises InputError that lists all demos if there is none of this name.
        """
        check_choice("NAME", cmd_name, DEMOS)
        from slimlab.demos.common import load_demo

        return load_demo(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter):
        """Write the list of demos to `formatter`, without importing them; `ctx` is not read."""
        with formatter.section("Demos"):
            formatter.write_dl([(name, line_about(name)) for name in DEMOS])


@click.group(cls=Demos, invoke_without_command=True, subcommand_metavar="[NAME] [OPTIONS]...")
@click.pass_context
def demo(ctx: click.Context):
    """Run the demo NAME on several ranks; without NAME list them.

    \b
    Each predicts what it will send, counts what it sends, compares its result with one process,
    and ends with exit code 1 if anything disagrees. `slimlab demo NAME --help` shows its options.
    The same programs run under launchers, on one machine or on many.
    Examples:
      slimlab demo hello
      slimlab demo ring_all_reduce --ranks 4 --backend mpi
      slimlab demo ping_pong --ranks 2 --backend gloo --json
      mpirun -n 4 python -m slimlab.demos.ring_all_reduce
      torchrun --nproc-per-node 4 -m slimlab.demos.ring_all_reduce
    \f

    ctx  of the command line
    """
    if ctx.invoked_subcommand is None:
        width = max(map(len, DEMOS))
        for name in DEMOS:
            click.echo(f"{name:<{width}}  {line_about(name)}")


@click.command()
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Only this one; may be given again. Default: all that this machine has.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Starts of the ranks, of which the medians count.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was kept as JSON.")
def calibrate(backends: tuple[str, ...], rounds: int, as_json: bool):
    """Measure what a message costs on this machine, fit alpha + beta n to it, and keep that.

    \b
    Two ranks send tensors of 8 bytes to 4 MiB to and fro, exchange and add them, some seconds per
    backend. The band says which share of the line was really measured, at the least and at most.
    Chapters and demos then predict seconds and not only bytes. The result lies in the cache folder,
    which SLIMLAB_CACHE names, one file per backend and machine; calibrating again replaces it.
    Examples:
      slimlab calibrate
      slimlab calibrate --backend mpi --rounds 10
      slimlab calibrate --json > costs.json
    \f

    backends  which to measure
    rounds    starts of the ranks
    as_json   print JSON
    """
    from slimlab.comm.calibrate import calibrate as measure
    from slimlab.comm.calibrate import save_calibration
    from slimlab.comm.launch import why_not

    found = {}
    for backend in backends or BACKENDS:
        reason = why_not(backend, 2)
        if reason is not None and not backends:
            click.echo(f"{backend} is left out: {reason}", err=True)
            continue
        measured = measure(backend, rounds=rounds)
        found[str(save_calibration(measured))] = measured
    if as_json:
        click.echo(json.dumps([{"file": path, **asdict(one)} for path, one in found.items()]))
    else:
        click.echo(_table(found))


def line_about(name: str) -> str:
    """Return the first line of a demo's docstring, without importing it.

    name  of a module in slimlab.demos
    """
    path = Path(__file__).resolve().parents[1] / "demos" / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")[0]


def _table(found: dict) -> str:
    from slimlab.comm.report import text_table

    def micro(seconds: float) -> str:
        return f"{seconds * 1e6:.3g} µs"

    rows = []
    for one in found.values():
        for what, line in (("message", one), ("exchange", one.exchange)):
            costs = micro(line.alpha_s), micro(line.beta_s_per_byte * 2**10)
            band = f"{line.band[0]:.2f} to {line.band[1]:.2f}"
            rows.append((one.backend, what, *costs, band, one.library))
        cost, band = micro(one.gamma_s_per_byte * 2**10), one.combine_band
        rows.append((one.backend, "addition", "", cost, f"{band[0]:.2f} to {band[1]:.2f}", ""))
    headers = ("backend", "of", "alpha", "per KiB", "measured / line", "carried by")
    kept = "\n".join(f"kept in {path}" for path in found)
    return f"{text_table(headers, rows)}\n{kept}"
