"""`slimlab plan`: the layouts of a model on a cluster, their memory, bytes and seconds.

Chapter 11 uses it. Production frameworks have such planners too, and measure where this predicts.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimlab.commands.training import OwnWords, number
from slimlab.config import InputError, check_choice, check_number, check_size, require
from slimlab.plan.hardware import CLUSTERS, Constants, constant_table, find_cluster
from slimlab.plan.known_models import MODELS, find_model
from slimlab.plan.layout_bytes import axis_bytes
from slimlab.plan.layout_search import Choices
from slimlab.plan.parallel_config import RECOMPUTE, num_micro_batches
from slimlab.plan.params import num_params
from slimlab.plan.planner import Candidate, Plan, plan_layouts
from slimlab.plan.software import SOFTWARE, find_software

if TYPE_CHECKING:
    from slimlab.config import ModelConfig

# A figure of more micro-batches than so many times the stages shows nothing more, one of more bars
# than so many nothing at all.
DRAWN, MOST_BARS = 2, 4000
PARTS = ("compute_s", "tensor_s", "message_s", "bubble_s", "data_s", "optimizer_s")
PINNED = (
    "tensor", "pipeline", "data", "micro_batch_size", "num_chunks", "recompute",
    "sequence_parallel", "zero_stage",
)  # fmt: skip
WORDS = dict(zip(PARTS, ("compute", "tensor", "messages", "bubble", "data", "optimizer")))


@click.command(cls=OwnWords)
@click.option(
    "--model", default="gpt3-175b", show_default=True, help=f"One of {', '.join(MODELS)}."
)
@click.option("--gpus", "num_gpus", type=int, default=1024, show_default=True, help="How many.")
@click.option("--hardware", default="a100-80gb", show_default=True,
              help=f"One of {', '.join(CLUSTERS)}.")  # fmt: skip
@click.option("--software", default="current", show_default=True,
              help=f"What the program does to save time: {', '.join(SOFTWARE)}.")  # fmt: skip
@number("--batch-size", int, None, "Sequences of a step; default: the model's.")
@number("--seq-len", int, None, "Tokens of a sequence; default: the model's.")
@number("--tokens", float, None, "Say how many days so many tokens take.")
@number("--tensor", int, None, "Pin the ranks that share each layer.")
@number("--pipeline", int, None, "Pin the number of stages.")
@number("--data", int, None, "Pin the number of replicas.")
@number("--micro-batch-size", int, None, "Pin the sequences that go through the stages together.")
@number("--num-chunks", int, None, "Pin the pieces of the model per stage.")
@click.option("--recompute", type=click.Choice(RECOMPUTE), help="Pin what is computed again.")
@click.option("--sequence-parallel/--no-sequence-parallel", default=None,
              help="Pin whether ranks of a tensor group share positions.")  # fmt: skip
@number("--zero-stage", int, None, "Pin what replicas share, 0 to 3.")
@number("--top", int, 8, "Layouts to list.")
@click.option("--timeline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Draw a step of the first layout into FILE, .svg or .png.")  # fmt: skip
@click.option("--constants", is_flag=True, help="List the model's constants and their sources.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    model: str,
    num_gpus: int,
    hardware: str,
    software: str,
    batch_size: int | None,
    seq_len: int | None,
    tokens: float | None,
    top: int,
    timeline: Path | None,
    constants: bool,
    as_json: bool,
    **pinned,
):
    """Plan the training of a model on many GPUs: the best layouts, and why others fail.

    \b
    Nothing runs: all is predicted, for a program that is tuned well; others are slower, by a tenth
    or more. Pin a size to compare layouts, or to see why one cannot be.
    Examples:
      slimlab plan --model gpt3-175b --gpus 1024 --hardware a100-80gb
      slimlab plan --model bloom-176b --gpus 384 --hardware a100-80gb-omnipath --tensor 4
      slimlab plan --model llama-65b --gpus 2048 --tokens 1.4e12 --timeline step.svg
      slimlab plan --constants
    \f

    model       which
    num_gpus    how many
    hardware    which cluster
    software    what the program does to save time
    batch_size  sequences of a step
    seq_len     tokens of a sequence
    tokens      of the whole training
    top         layouts to list
    timeline    where a figure goes
    constants   list the constants instead
    as_json     print JSON
    pinned      sizes of the layout that were given
    """
    if constants:
        click.echo(_constants_text(as_json))
        return
    _check(top, tokens, timeline, seq_len)
    known = find_model(model)
    config = replace(known.config, seq_len=seq_len or known.config.seq_len)
    head = {
        "model": model, "num_params": num_params(config), "num_gpus": num_gpus,
        "hardware": hardware, "software": software, "seq_len": config.seq_len,
        "batch_size": known.batch_size if batch_size is None else batch_size,
    }  # fmt: skip
    fixed = {name: (pinned[name],) for name in PINNED if pinned[name] is not None}
    found = _search(config, head, Choices(**fixed))
    layouts = [_facts(config, one, head, tokens) for one in found.best[:top]]
    if timeline is not None:
        _draw(config, found.best[0], head, timeline)
    if as_json:
        refused = [asdict(one) for one in found.refused]
        click.echo(json.dumps({**head, "layouts": layouts, "refused": refused}, indent=2))
    else:
        click.echo(_plan_text(head, layouts, found))


def _check(top: int, tokens: float | None, timeline: Path | None, seq_len: int | None) -> None:
    check_size("top", top)
    if seq_len is not None:
        check_size("seq_len", seq_len)
    if timeline is not None:
        check_choice("the ending of the timeline's file", timeline.suffix, (".svg", ".png", ".pdf"))
        parent = timeline.parent
        require(parent.is_dir(), "a folder for the figure", f"{parent}, none", "name another file")
    if tokens is not None:
        check_number("tokens", tokens, float, 0, float("inf"), above=True)


def _search(config: "ModelConfig", head: dict, choices: Choices) -> Plan:
    """Search, and add to `head` how many layouts there were."""
    cluster, software = find_cluster(head["hardware"]), find_software(head["software"])
    given = {"software": software, "choices": choices}
    found = plan_layouts(config, cluster, head["num_gpus"], head["batch_size"], **given)
    head["limit_bytes"] = found.limit_bytes
    head["num_layouts"], head["num_fitting"] = found.num_layouts, len(found.best)
    return found


def _facts(config: "ModelConfig", one: Candidate, head: dict, tokens: float | None) -> dict:
    """All that is predicted of a layout, as JSON holds it."""
    time = one.time
    bytes_of = axis_bytes(config, one.parallel, head["batch_size"], find_software(head["software"]))
    facts = {
        **asdict(one.parallel),
        "memory_bytes": one.memory_bytes,
        "memory": one.items,
        "step_s": time.total_s,
        "parts_s": {name: getattr(time, name) for name in PARTS},
        "sent_bytes_first_stage": bytes_of,
        "mfu": time.mfu,
        "model_flop_per_s_per_gpu": time.model_flop_per_s_per_gpu,
        "tokens_per_s": time.tokens_per_s,
    }
    return {**facts, "days": time.days(tokens)} if tokens is not None else facts


def _draw(config: "ModelConfig", one: Candidate, head: dict, path: Path) -> None:
    """Simulate a step of a layout, or its first micro-batches, and draw who computes when."""
    from slimlab.parallel.schedules import interleaved, one_forward_one_backward
    from slimlab.plan.pipeline_simulator import simulate
    from slimlab.plan.step_pipeline import planned_stage_times
    from slimlab.show.schedules import schedule_figure
    from slimlab.show.style import use_style

    parallel, batch_size = one.parallel, head["batch_size"]
    times = planned_stage_times(
        config,
        find_cluster(head["hardware"]),
        parallel,
        batch_size,
        software=find_software(head["software"]),
    )
    count = num_micro_batches(parallel, batch_size)
    drawn = _num_drawn(parallel.pipeline, parallel.num_chunks, count)
    if parallel.num_chunks > 1:
        schedule = interleaved(parallel.pipeline, drawn, parallel.num_chunks)
    else:
        schedule = one_forward_one_backward(parallel.pipeline, drawn)
    shown = f"{drawn} of {count} micro-batches, predicted"
    use_style()
    figure = schedule_figure(simulate(schedule, times), f"{head['model']}: {shown}\n{parallel}")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InputError(
            "a file that can be written", f"{path}: {error}", "name another"
        ) from error


def _num_drawn(stages: int, chunks: int, count: int) -> int:
    """Choose how many of a step's micro-batches a figure shows; of chunks, a multiple of stages."""
    multiple = stages if chunks > 1 else 1
    most = MOST_BARS // (2 * stages * chunks * multiple) * multiple
    require(
        most > 0,
        f"a figure of at most {MOST_BARS} bars",
        f"{stages} stages of {chunks} chunks, {2 * stages * chunks * multiple} bars at the least",
        "pin num_chunks=1, or fewer stages",
    )
    return min(count, DRAWN * stages, most)


def _plan_text(head: dict, layouts: list[dict], found: Plan) -> str:
    from slimlab.comm.report import text_table

    days = ["days"] if "days" in layouts[0] else []
    names = ("tensor", "pipeline", "data", "micro", "chunks", "recompute", "sequence", "ZeRO")
    rows = []
    for one in layouts:
        row = [one[name] for name in PINNED]
        row[6] = "yes" if row[6] else "no"
        row += [f"{one['memory_bytes'] / 1e9:.1f} GB", f"{one['step_s']:.2f} s"]
        row += [f"{one['mfu']:.1%}", f"{one['tokens_per_s']:,.0f}"]
        rows.append(row + [f"{one['days']:.1f}" for _ in days])
    headers = [*names, "memory", "step", "MFU", "tokens/s", *days]
    best = layouts[0]
    parts = (f"{WORDS[name]} {best['parts_s'][name] / best['step_s']:.1%}" for name in PARTS)
    sent = best["sent_bytes_first_stage"].items()
    lines = [
        f"{head['model']}: {head['num_params'] / 1e9:.1f} billion parameters, "
        f"{head['num_gpus']} GPUs of {head['hardware']}, {head['batch_size']} sequences of "
        f"{head['seq_len']} tokens, software {head['software']}",
        f"{head['num_layouts']} legal layouts, {head['num_fitting']} fit {_limit(head)}",
        "",
        text_table(headers, rows),
        "",
        f"the first: {', '.join(parts)}",
        "a rank of its first stage sends per step: "
        + ", ".join(f"{axis} {count / 1e9:.1f} GB" for axis, count in sent),
        "its memory: " + ", ".join(f"{k} {v / 1e9:.1f} GB" for k, v in best["memory"].items()),
        "",
        "others fail:",
        *(f"  {one.count:>6}  {one.reason}, such as {one.example}" for one in found.refused),
    ]
    return "\n".join(lines)


def _limit(head: dict) -> str:
    return f"{head['limit_bytes'] / 1e9:.1f} GB"


def _constants_text(as_json: bool) -> str:
    rows, lines = constant_table(Constants()), []
    if as_json:
        return json.dumps(rows, indent=2)
    for one in rows:
        lines.append(
            f"{one['name']} = {one['value']:g} {one['unit'] if one['unit'] != '1' else ''}"
        )
        lines += [f"    {one['meaning']}", f"    {one['source']}"]
    return "\n".join(line.rstrip() for line in lines)
