"""`slimlab train` and `slimlab generate`: a text into a model, a model into text.

Chapter 05 uses them. Production trainers read their many settings from files and log to a service.
"""

import json
import re
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimlab.commands.mesh import (
    first_rank_speaks,
    launched_rank,
    mesh_options,
    needs_ranks,
    train_by_layout,
)
from slimlab.config import InputError, TrainingConfig
from slimlab.train import recipe

if TYPE_CHECKING:
    from slimlab.text.corpus import Corpus

MODEL, TRAINING = recipe.MODEL, recipe.TRAINING
CHOICES = {"feed_forward": MODEL["feed_forward"]}
SIZES = ("d_model", "num_layers", "num_heads", "num_kv_heads", "dropout")


# Where a library's argument and an option have different names.
OPTIONS = {"num_steps": "--steps", "peak_lr": "--lr", "held_out_fraction": "--held-out"}


class OwnWords(click.Command):
    """A command whose errors name its options where the library names arguments."""

    def invoke(self, ctx: click.Context):
        """Run the command in `ctx`.

        Raises InputError with its last part in the words of the command line.
        """
        try:
            return super().invoke(ctx)
        except InputError as error:
            change = in_options(error.change, {one.name: one.opts[0] for one in self.params})
            raise InputError(error.asked, error.given, change) from error


def in_options(text: str, options: dict[str, str]) -> str:
    """Write --seq-len for seq_len, --steps 12 for num_steps=12, --resume for resume=True.

    text     what to change
    options  names of arguments, and options as they are typed
    """
    options = {name: typed for name, typed in options.items() if typed.startswith("-")} | OPTIONS

    def typed(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        # A word such as seed or device stands for the thing, unless a value follows.
        if name not in options or (value is None and "_" not in name):
            return match[0]
        return options[name] if value in (None, "True") else f"{options[name]} {value}"

    return re.sub(
        r'(?<![\w./-])(?P<name>[a-z]\w*)(?:="?(?P<value>[\w.:]*\w)"?)?(?![\w(])', typed, text
    )


def number(name: str, kind: type, default: object, text: str):
    """Make an option that takes a number and shows its default.

    name     as it is typed
    kind     int or float
    default  None shows none
    text     what it means
    """
    shown = default is not None
    return click.option(name, type=kind, default=default, show_default=shown, help=text)


@click.command(cls=OwnWords)
@click.argument("texts", nargs=-1, type=click.Path(path_type=Path), metavar="[TEXT]...")
@click.option("--out", type=click.Path(path_type=Path), default="runs/mine", show_default=True,
              help="Folder of the run: checkpoints, history, tokenizer.")  # fmt: skip
@number("--steps", int, TRAINING["num_steps"], "Updates of the weights.")
@number("--batch-size", int, TRAINING["batch_size"], "Sequences of an update.")
@number("--micro-batch-size", int, None, "Sequences in memory at a time; default: all.")
@number("--seq-len", int, MODEL["seq_len"], "Tokens of a sequence.")
@number("--d-model", int, MODEL["d_model"], "Width.")
@number("--num-layers", int, MODEL["num_layers"], "Blocks.")
@number("--num-heads", int, MODEL["num_heads"], "Attention heads.")
@number("--num-kv-heads", int, None, "Key/value heads; default: num-heads.")
@number("--vocab-size", int, recipe.VOCAB_SIZE, "Tokens at most.")
@number("--dropout", float, MODEL["dropout"], "Part of the features set to 0.")
@number("--lr", float, TRAINING["peak_lr"], "Highest learning rate.")
@number("--warmup-steps", int, None, "Updates until then; default: a twentieth.")
@number("--weight-decay", float, TRAINING["weight_decay"], "Of matrices.")
@number("--seed", int, TRAINING["seed"], "Of weights, batches and dropout.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16", "float16"]),
              default="float32", show_default=True, help="Of matrix products.")  # fmt: skip
@click.option("--recompute", type=click.Choice(["none", "block"]), default="none",
              show_default=True, help="block: less memory, a third more work.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@number("--validate-every", int, 100, "Steps between measurements on held-out text.")
@number("--save-every", int, 100, "Steps between checkpoints.")
@number("--keep-checkpoints", int, 2, "So many stay.")
@number("--held-out", float, recipe.HELD_OUT_FRACTION, "Part of the text to measure by.")
@number("--max-bytes", int, None, "Take so much of the text, from the front.")
@click.option("--resume/--no-resume", default=True, show_default=True,
              help="Go on with the run in --out, or refuse a folder that holds one.")  # fmt: skip
@click.option("--new-settings", is_flag=True,
              help="Go on with another lr, number of steps, batch size or decay.")  # fmt: skip
@mesh_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    texts: tuple[Path, ...], out: Path, resume: bool, new_settings: bool, as_json: bool, **given
):
    """Train a model on TEXT: files, folders or JSON lines; on the book's own text without one.

    \b
    The same command goes on where the last one ended, by Ctrl-C, kill -9 or a full disk; with other
    settings it refuses and says which differ; some may, with --new-settings.
    Examples:
      slimlab train                                the model of the book, into runs/mine
      slimlab train notes/ --out runs/notes        on the texts in a folder
      slimlab train a.jsonl.zst --max-bytes 5000000 --d-model 256 --steps 2000 --out runs/big
      slimlab train --device cuda --precision bfloat16 --batch-size 64 --out runs/gpu
      slimlab train notes/ --out runs/notes --steps 2000 --new-settings     twice as long
      slimlab train --dp 2 --tp 2 --zero 1 --backend gloo --out runs/four   on four ranks
      mpirun -n 4 slimlab train --dp 2 --pp 2 --out runs/four               goes on with that
    \f

    texts    files and folders
    out      folder of the run
    resume   go on with what is there
    new_settings  go on with other settings
    as_json  print JSON
    given    the sizes and settings
    """
    shown = sys.stderr.isatty()
    options = {
        "vocab_size": given["vocab_size"],
        "sizes": {**CHOICES, **{name: given[name] for name in SIZES}},
        "residual": recipe.RESIDUAL,
        "resume": resume,
        "new_settings": new_settings,
        "show": shown,
        "say": partial(click.echo, err=True),
        "watch": None if shown else _print_line,
    }
    start_s = time.perf_counter()
    with first_rank_speaks():
        config = _training_config(given)
        corpus = _corpus(texts, given["held_out"], given["max_bytes"])
        if not launched_rank():
            click.echo(corpus.describe(), err=True)
        if needs_ranks(given):
            result, prints = train_by_layout(given, corpus, out, config, options)
        else:
            result, prints = _train_alone(corpus, out, config, options), True
    if prints:
        _print_result(result, out, time.perf_counter() - start_s, as_json)


def _train_alone(corpus: "Corpus", out: Path, config: TrainingConfig, options: dict) -> dict:
    from slimlab.model.transformer import device_of, num_params
    from slimlab.train.interrupts import Interrupted
    from slimlab.train.text_model import train_on_text

    try:
        trained = train_on_text(corpus, out, config, **options)
    except Interrupted as stop:
        click.echo(f"slimlab: {stop}", err=True)
        sys.exit(128 + stop.signal_number)
    history = trained.history
    return {
        "steps": history.steps[-1] if history.steps else None,
        "num_params": num_params(trained.model),
        "vocab_size": trained.tokenizer.vocab_size,
        "device": str(device_of(trained.model)),
        "loss": history.losses[-1] if history.losses else None,
        "held_out_loss": history.validation[-1][1] if history.validation else None,
        "held_out_bits_per_byte": trained.bits_per_byte,
    }


def _corpus(texts: tuple[Path, ...], held_out: float, max_bytes: int | None):
    from slimlab.text.corpus import corpus_from, reference_corpus
    from slimlab.text.sources import read_documents

    if not texts and max_bytes is None:
        return reference_corpus(held_out_fraction=held_out)
    documents = (text for path in texts for text in read_documents(path))
    if not texts:
        documents = reference_corpus(held_out_fraction=0).train
    name = ", ".join(path.name for path in texts) or "english"
    return corpus_from(documents, name, held_out, max_bytes)


def _training_config(given: dict) -> TrainingConfig:
    names = {one.name for one in fields(TrainingConfig)} & set(given)
    return TrainingConfig(
        num_steps=given["steps"], peak_lr=given["lr"], **{name: given[name] for name in names}
    )


def _print_line(record: dict) -> None:
    """A line where a bar would be noise: in a file, at each measurement."""
    if "validation_loss" in record:
        click.echo(
            f"step {record['step']}: loss {record['loss']:.3f}, "
            f"held out {record['validation_loss']:.3f}",
            err=True,
        )


def _print_result(result: dict, out: Path, seconds: float, as_json: bool) -> None:
    result = {"folder": str(out), "seconds": round(seconds, 3), **result}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    measured = result["held_out_bits_per_byte"]
    held_out = f"{measured:.3f} bits per byte of the held-out text, " if measured else ""
    click.echo(
        f"{out}: {result['num_params']:,} parameters, {result['steps']} steps on "
        f"{result['device']}, {held_out}{seconds:.0f} s"
    )
    click.echo(f'let it write: slimlab generate {out} --prompt "The"')


@click.command(cls=OwnWords)
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("--prompt", default="The", show_default=True, help="How the text begins; '' too.")
@number("--max-new-tokens", int, 100, "Tokens to add at most.")
@number("--temperature", float, 0.8, "0 takes the likeliest token, 1 draws as the model says.")
@number("--top-k", int, None, "Draw from so many likeliest tokens only.")
@number("--top-p", float, None, "Draw from the likeliest that have this probability together.")
@number("--seed", int, 0, "Of the draws: the same text every time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print prompt and text as JSON.")
def generate(source: Path | None, prompt: str, device: str, as_json: bool, **given):
    """Let the model in SOURCE continue a text; without SOURCE the model of the book.

    \b
    SOURCE is the folder of a run, one of its checkpoints, a folder that slimlab slim wrote, or one
    of save_pretrained with the run's tokenizer.json beside the weights. The first call without
    SOURCE trains for about 90 s.
    Examples:
      slimlab generate --prompt "The value of"
      slimlab generate runs/mine --prompt "A list is" --max-new-tokens 200
      slimlab generate runs/mine/step_00000300 --temperature 0
      slimlab generate runs/mine --temperature 1 --top-p 0.9 --seed 7
    \f

    source   where the model lies
    prompt   how the text begins
    device   where to compute
    as_json  print JSON
    given    max_new_tokens, temperature, top_k, top_p and seed
    """
    from slimlab.slim.load import load_any_model
    from slimlab.train.device import choose_device
    from slimlab.train.text_model import TextModel, continue_text

    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # the shell's bytes, passed on by Python as half pairs
        change = "type it in a terminal of UTF-8, or convert it: iconv -f ENCODING -t UTF-8"
        raise InputError("a prompt in UTF-8", ascii(prompt), change) from error
    if source is None:
        from slimlab.train.reference import reference_model

        found = reference_model()
        model = found.model.to(choose_device(device))
        trained = TextModel(model, found.tokenizer, "the model of the book")
    else:
        trained = load_any_model(source, device)
    text = continue_text(trained, prompt, **given)
    if as_json:
        click.echo(json.dumps({"source": trained.source, "prompt": prompt, "text": text}))
    else:
        click.echo(text)
