"""Zero-bubble schedules: input gradients first, weight gradients into what would be idle time.

The stage before waits for the input gradient only, and for the weight gradient nobody waits. Split
in two, the backward hands its message on sooner, and its second half fills the gaps. Chapter 10
compares them with 1F1B. Qi et al. 2024 (arXiv:2401.10241).

Production: their paper also searches orders with an integer program, for times that are not equal
and for a limit on memory, and lets each stage step its optimizer without waiting for the others.
These are the orders that they wrote by hand for equal times; ZB-H2, which holds twice the
activations of 1F1B, is left out.
"""

from collections.abc import Iterator

from slimlab.config import check_choice, require
from slimlab.parallel.schedules import (
    alternate,
    check_schedule_sizes,
    gpipe,
    interleaved,
    naive,
    one_forward_one_backward,
)
from slimlab.plan.pipeline_schedule import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Instruction,
    Schedule,
)


def zb_h1(num_stages: int, num_micro_batches: int) -> Schedule:
    """Follow 1F1B with the backward split; stage s keeps s weight gradients waiting.

    So every stage holds as many activations as the first one of 1F1B, p, and the weight gradients
    that waited fill the end of the step.

    num_stages         p
    num_micro_batches  m
    returns            the schedule

    Raises InputError for sizes that are no whole numbers of at least 1.
    Qi et al. 2024 (arXiv:2401.10241), section 2.2.
    """
    check_schedule_sizes(num_stages, num_micro_batches)
    numbers = range(num_micro_batches)
    forwards = [Instruction(FORWARD, number) for number in numbers]
    gradients = [Instruction(INPUT_GRADIENT, number) for number in numbers]
    orders = []
    for stage in range(num_stages):
        order = alternate(forwards, gradients, warmup=num_stages - 1 - stage)
        orders.append(tuple(_with_weight_gradients(order, behind=stage)))
    return Schedule("zb_h1", num_micro_batches, tuple(orders))


def _with_weight_gradients(order: tuple[Instruction, ...], behind: int) -> Iterator[Instruction]:
    """Put the weight gradient of an input gradient after the one that comes `behind` later."""
    waiting = []
    for one in order:
        yield one
        if one.kind == INPUT_GRADIENT:
            waiting.append(Instruction(WEIGHT_GRADIENT, one.micro_batch, one.chunk))
            if len(waiting) > behind:
                yield waiting.pop(0)
    yield from waiting


def zb_v(num_stages: int, num_micro_batches: int) -> Schedule:
    """Bring the model down the stages and up again: the first stage also holds the last chunk.

    The loss is on stage 0, which can begin to go back after 2 p forwards of half a stage each, and
    all stages hold the same number of activations, those of 1F1B's first stage. If all three times
    are equal and m is at least 2 p - 1, no stage ever waits between its first and its last
    instruction.

    num_stages         p
    num_micro_batches  m
    returns            the schedule, two chunks on each stage, placed as a v

    Raises InputError for sizes that are no whole numbers of at least 1.
    Qi et al. 2024 (arXiv:2401.10241), section 6.
    """
    check_schedule_sizes(num_stages, num_micro_batches)
    # With fewer micro-batches than fill the pipeline, the others are left out of a longer order.
    enough = max(2 * num_stages - 1, num_micro_batches)
    orders = []
    for stage in range(num_stages):
        counts = {letter + chunk: 0 for letter in "FIW" for chunk in "01"}
        order = []
        for word in _v_words(num_stages, stage, enough):
            number, counts[word] = counts[word], counts[word] + 1
            if number < num_micro_batches:
                order.append(Instruction(V_LETTERS[word[0]], number, int(word[1])))
        orders.append(tuple(order))
    return Schedule("zb_v", num_micro_batches, tuple(orders), num_chunks=2, placement="v")


V_LETTERS = {"F": FORWARD, "I": INPUT_GRADIENT, "W": WEIGHT_GRADIENT}


def _v_words(num_stages: int, stage: int, num_micro_batches: int) -> list[str]:
    """Write a stage's order as letter and chunk; each word takes the next micro-batch."""
    after = num_stages - stage
    # The first micro-batches go down and, on their way up, meet the ones that follow them down.
    fill = ["F0"] * (2 * after - 1) + ["F1", "F0"] * stage + ["F1", "I1", "W1"] * after
    begun = fill.count("F0")
    steady = []
    for number in range(num_micro_batches - num_stages):
        steady += ["F0"] if begun + number < num_micro_batches else []
        steady += ["I0", "W0", "F1", "I1", "W1"]
    drain = ["I0", "I1"] * stage + ["I0", "W0"] * after + ["W1"] * stage + ["W0"] * stage
    return [*fill, *steady, *drain]


SCHEDULES = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb_h1": zb_h1,
    "zb_v": zb_v,
}
CHUNKS = {"interleaved": 2, "zb_v": 2}


def make_schedule(
    name: str, num_stages: int, num_micro_batches: int, num_chunks: int | None = None
) -> Schedule:
    """Make a schedule by its name.

    name               one of naive, gpipe, 1f1b, interleaved, zb_h1, zb_v
    num_stages         p
    num_micro_batches  m
    num_chunks         v, chunks of each stage; None: 2 for interleaved and zb_v, else 1
    returns            the schedule

    Raises InputError for an unknown name, sizes that are no whole numbers of at least 1, or a
    number of chunks that the schedule does not have.
    """
    check_choice("name", name, tuple(SCHEDULES))
    usual = CHUNKS.get(name, 1)
    if name == "interleaved":
        chunks = usual if num_chunks is None else num_chunks
        return interleaved(num_stages, num_micro_batches, chunks)
    require(
        num_chunks in (None, usual),
        f"{name}, which has {usual} chunk{'s' * (usual > 1)} on each stage",
        f"num_chunks = {num_chunks!r}",
        f'give num_chunks = {usual}, or name = "interleaved"',
    )
    return SCHEDULES[name](num_stages, num_micro_batches)
