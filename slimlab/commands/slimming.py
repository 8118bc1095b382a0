"""`slimlab slim`: a checkpoint in, a smaller one and a report out.

Chapter 15 ends with it. Production tools take a recipe from a file, and the hardware to tune for.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimlab.commands.training import OwnWords, number
from slimlab.config import InputError, check_choice, require

if TYPE_CHECKING:
    from slimlab.slim.report import SlimReport

FIGURES = (".png", ".svg", ".pdf")


@click.command(cls=OwnWords)
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--distill", is_flag=True, help="Train a student of fewer layers.")
@number("--student-layers", int, None, "Its layers; default: half.")
@number("--distill-steps", int, 400, "Updates of the student.")
@number("--distill-temperature", float, 1.0, "T of the soft targets.")
@number("--soft-weight", float, 0.9, "1: learn from the original alone, 0: from the text alone.")
@click.option("--divergence", type=click.Choice(["forward", "reverse"]), default="forward",
              show_default=True, help="Which Kullback-Leibler divergence.")  # fmt: skip
@number("--prune", float, None, "Part that goes, 0.5 for half.")
@click.option("--prune-what", default="neurons", show_default=True,
              help="neurons, heads or both: removed; weights or 2:4: zeros.")  # fmt: skip
@number("--prune-steps", int, 200, "Updates of retraining.")
@click.option("--quantize", default=None, metavar="FORMAT",
              help="int8, int4, int3, int2, or 16 bits: bfloat16, float16.")  # fmt: skip
@number("--quant-group-size", int, None, "Weights per scale below 8 bits; default: near 32.")
@click.option("--rounding", default=None,
              help="nearest or compensated; default: what suits the rest.")  # fmt: skip
@click.option("--activations", default="none", show_default=True,
              help="dynamic: int8 layers multiply in int8.")  # fmt: skip
@number("--aware-steps", int, 0, "Updates with rounded weights before the rounding.")
@number("--batch-size", int, 8, "Sequences of an update.")
@number("--lr", float, 1e-3, "Highest learning rate.")
@number("--seed", int, 0, "Of the windows drawn.")
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="Text to learn from and measure by; may be repeated.")  # fmt: skip
@number("--held-out", float, 0.1, "Part of the text to measure by.")
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw the report there instead of OUT/report.png.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def slim(
    source: str,
    out: Path,
    texts: tuple[Path, ...],
    held_out: float,
    figure: Path | None,
    as_json: bool,
    **given,
):
    """Make the model in SOURCE smaller; write it and a report into the new folder OUT.

    \b
    SOURCE is "book" for the model of the book, or the folder of a run, one of its checkpoints, or a
    folder of save_pretrained with the run's tokenizer.json. It is only read. The steps are taken in
    this order: distill, prune and retrain, quantize; the original teaches in all of them. Without
    --text the text is the book's own.
    Examples:
      slimlab slim book runs/small --quantize int4
      slimlab slim book runs/four --quantize int4 --aware-steps 100
      slimlab slim book runs/less --distill --prune 0.5 --quantize int8
      slimlab slim book runs/least --distill --student-layers 3 --distill-steps 150 --prune 0.25 \\
          --prune-steps 100 --quantize int4 --aware-steps 100
      slimlab slim runs/mine runs/mine_int8 --text notes/ --quantize int8 --activations dynamic
      slimlab generate runs/small --prompt "The"
    \f

    source    where the original lies
    out       folder of the small model
    texts     files and folders
    held_out  part of the text to measure by
    figure    where the figure goes
    as_json   print JSON
    given     the choices of SlimConfig
    """
    _check_figure(figure, source, out)
    _check_updates(given)
    there = os.path.lexists(out)
    try:
        report = _made(source, out, (texts, held_out), given)
        _draw(report, figure or out / "report.png")
    except KeyboardInterrupt:
        written = os.path.lexists(out) and not there  # whole, or it has not this name
        done = "is written, though its figure may not be" if written else "was not written"
        click.echo(f"slimlab: stopped; {out} {done}, {source} is as it was", err=True)
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    click.echo(report.as_text())
    click.echo(f'let it write: slimlab generate {out} --prompt "The"')


def _made(source: str, out: Path, text: tuple, given: dict) -> "SlimReport":
    from slimlab.slim.recipe import SlimConfig, slim_checkpoint

    config = SlimConfig(peak_lr=given.pop("lr"), **given)
    return slim_checkpoint(
        source,
        out,
        config,
        corpus=_corpus(*text),
        show=sys.stderr.isatty(),
        say=partial(click.echo, err=True),
    )


def _corpus(texts: tuple[Path, ...], held_out: float):
    from slimlab.text.corpus import corpus_from
    from slimlab.text.sources import read_documents

    if not texts:
        return None  # the book's
    documents = (text for path in texts for text in read_documents(path))
    return corpus_from(documents, ", ".join(path.name for path in texts), held_out)


def _check_updates(given: dict) -> None:
    """Refuse updates that were typed for a step that was not."""
    typed = click.core.ParameterSource.COMMANDLINE
    source = click.get_current_context().get_parameter_source
    for step, example in (("distill", "distill=True"), ("prune", "prune=0.5")):
        name = f"{step}_steps"
        idle = source(name) == typed and given[step] in (None, False)
        asked, wrong = f"--{step}-steps with --{step}", f"{given[name]} updates without it"
        require(not idle, asked, wrong, f"give {example}, or leave {name} out")


def _check_figure(path: Path | None, source: str, out: Path) -> None:
    if path is None:
        return
    check_choice("the ending of the figure's file", path.suffix, FIGURES)
    asked, given = "a folder for the figure", f"{path.parent}, none"
    require(path.parent.is_dir() or path.parent == out, asked, given, "name another file")
    own, places = os.path.realpath(source), map(str, Path(os.path.realpath(path)).parents)
    asked, given = "a figure outside the original", f"{path} in {source}"
    inside = source != "book" and own in places
    require(not inside, asked, given, "name another file; the original is never written to")


def _draw(report: "SlimReport", path: Path) -> None:
    from slimlab.show.slimming import slimming_figure
    from slimlab.show.style import use_style

    use_style()
    try:
        slimming_figure(report).savefig(path)
    except OSError as error:
        given = f"{path}: {error.strerror or error}; the small model is whole in {report.out}"
        raise InputError("a figure that can be written", given, "name another") from error
