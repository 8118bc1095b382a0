"""The command `slimlab`; slimlab.commands has a module for each group of its commands.

Chapter 00 uses it. What a person can mend is shown without a traceback; `slimlab --debug ...` shows
the traceback too. Every command imports what it needs when it runs, so that --help is quick.
Production tools log to files and read configuration files as well; this prints.
"""

import sys
import traceback

import click

from slimlab import __version__
from slimlab.commands.book import doctor, list_chapters, run
from slimlab.commands.classroom import check, grade, handout
from slimlab.commands.communication import calibrate, demo
from slimlab.commands.planning import plan
from slimlab.commands.slimming import slim
from slimlab.commands.training import generate, train
from slimlab.config import InputError


class Commands(click.Group):
    """A group of commands that shows errors as messages."""

    def invoke(self, ctx: click.Context):
        """Run the command in `ctx`; exit with 2 for an InputError, 1 for any other error."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a pipe may know no stars and ticks
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.exceptions.Abort, click.ClickException):
            raise
        except BrokenPipeError:
            raise  # `slimlab list | head`: click ends quietly
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            asked = isinstance(error, InputError)
            text = str(error) if asked else f"{type(error).__name__}: {error}"
            click.echo(f"slimlab: {text}", err=True)
            if not asked and not ctx.params.get("debug"):
                doctor = "; slimlab doctor says what is missing"
                more = doctor if isinstance(error, ImportError) else ""
                click.echo(f"(slimlab --debug ... shows where{more})", err=True)
            ctx.exit(2 if asked else 1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="slimlab")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool):
    """Read, run, check and grade the book; train its model; run and plan programs of many ranks.

    \b
    Examples:
      slimlab doctor                      what this machine has and lacks
      slimlab list                        chapters and exercises
      slimlab run 01                      run a chapter from top to bottom
      slimlab check 01 my.ipynb           check one's own notebook
      slimlab grade submissions/          grade a class
      slimlab handout class/              a copy of the book for students
      slimlab train --out runs/mine       train the model of the book
      slimlab generate runs/mine          let it write
      slimlab slim runs/mine runs/small --quantize int4    make it smaller
      slimlab demo ring_all_reduce        run a program on several ranks
      slimlab calibrate                   measure what messages cost here
      slimlab plan --model gpt3-175b      layouts of a model on many GPUs
    \f

    debug  show tracebacks
    """


for command in (
    doctor, list_chapters, run, check, grade, handout, train, generate, slim, demo, calibrate,
    plan,
):  # fmt: skip
    main.add_command(command)


if __name__ == "__main__":
    main()
