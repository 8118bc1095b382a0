"""The schedules of pipeline parallelism as data: naive, GPipe, 1F1B, interleaved 1F1B.

Chapter 10 builds on them: slimlab.parallel.schedule_checks looks at their order, and
slimlab.plan.pipeline_simulator times them. Zero-bubble schedules are in
slimlab.parallel.schedules_zero_bubble. All have a flush: a step ends when every micro-batch went
forward and backward, so every gradient is of the same weights.

PipeDream (Narayanan et al. 2019) has no flush and keeps several versions of the weights instead;
it trains another sequence of weights than one process, and is left out.
"""

from collections.abc import Sequence

from slimlab.config import check_size
from slimlab.plan.pipeline_schedule import BACKWARD, FORWARD, Instruction, Schedule


def naive(num_stages: int, num_micro_batches: int) -> Schedule:
    """Send one micro-batch through all stages and back, then the next: one stage works at a time.

    num_stages         p
    num_micro_batches  m
    returns            the schedule

    Raises InputError for sizes that are no whole numbers of at least 1.
    """
    check_schedule_sizes(num_stages, num_micro_batches)
    order = alternate(*_batches(num_micro_batches), warmup=0)
    return Schedule("naive", num_micro_batches, (order,) * num_stages)


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """Send all micro-batches forward, then all backward; each stage holds all their activations.

    num_stages         p
    num_micro_batches  m
    returns            the schedule

    Raises InputError for sizes that are no whole numbers of at least 1.
    Huang et al. 2019 (arXiv:1811.06965), section 2.3.
    """
    check_schedule_sizes(num_stages, num_micro_batches)
    forwards, backwards = _batches(num_micro_batches)
    return Schedule("gpipe", num_micro_batches, ((*forwards, *backwards),) * num_stages)


def one_forward_one_backward(num_stages: int, num_micro_batches: int) -> Schedule:
    """Start each backward as soon as it can, so that stage s holds p - s activations and no more.

    Stage s sends p - s - 1 micro-batches forward, the number of stages after it. From then on it
    takes one forward and one backward in turn, until the forwards have run out.

    num_stages         p
    num_micro_batches  m
    returns            the schedule, called 1f1b

    Raises InputError for sizes that are no whole numbers of at least 1.
    Narayanan et al. 2021 (arXiv:2006.09503), section 3.2: PipeDream-Flush.
    """
    check_schedule_sizes(num_stages, num_micro_batches)
    forwards, backwards = _batches(num_micro_batches)
    orders = [
        alternate(forwards, backwards, warmup=num_stages - 1 - stage) for stage in range(num_stages)
    ]
    return Schedule("1f1b", num_micro_batches, tuple(orders))


def interleaved(num_stages: int, num_micro_batches: int, num_chunks: int = 2) -> Schedule:
    """Alternate as 1F1B does, on stages of several chunks: the pipeline fills in smaller pieces.

    Micro-batches go in rounds of p: a round through the first chunks of all stages, then through
    their second chunks. The paper demands that p divides m. Here the rounds are longer if it does
    not, and differ by one at most: the bubble stays what it is, each stage holds some more.

    num_stages         p
    num_micro_batches  m
    num_chunks         v, chunks of each stage; with 1 it is 1F1B
    returns            the schedule

    Raises InputError for sizes that are no whole numbers of at least 1.
    Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    check_schedule_sizes(num_stages, num_micro_batches, num_chunks)
    rounds = rounds_of(num_stages, num_micro_batches)
    chunks = range(num_chunks)
    forwards = in_rounds(FORWARD, rounds, chunks)
    backwards = in_rounds(BACKWARD, rounds, chunks[::-1])
    orders = []
    for stage in range(num_stages):
        # A message there and a message back for each stage that comes after.
        warmup = (num_chunks - 1) * rounds[0] + 2 * (num_stages - 1 - stage)
        if num_chunks == 1:
            warmup = num_stages - 1 - stage
        orders.append(alternate(forwards, backwards, warmup=warmup))
    return Schedule("interleaved", num_micro_batches, tuple(orders), num_chunks)


def alternate(
    forwards: Sequence[Instruction], backwards: Sequence[Instruction], *, warmup: int
) -> tuple[Instruction, ...]:
    """Join two lists: some forwards, then a forward and a backward in turn, then backwards.

    forwards   in their order
    backwards  in theirs, as many
    warmup     how many forwards come first; all of them if there are not so many
    """
    warmup = min(warmup, len(forwards))
    pairs = zip(forwards[warmup:], backwards)
    in_turn = [one for pair in pairs for one in pair]
    return (*forwards[:warmup], *in_turn, *backwards[len(forwards) - warmup :])


def rounds_of(num_stages: int, num_micro_batches: int) -> list[int]:
    """Divide micro-batches into rounds of at least one for each stage, as short as possible.

    num_stages         p
    num_micro_batches  m; one round if there are fewer than p
    returns            micro-batches of each round, longer ones first
    """
    count = max(1, num_micro_batches // num_stages)
    short, longer = divmod(num_micro_batches, count)
    return [short + (number < longer) for number in range(count)]


def in_rounds(kind: str, rounds: Sequence[int], chunks: Sequence[int]) -> list[Instruction]:
    """List the instructions of one kind: each round through one chunk after the other.

    kind    of the instructions
    rounds  micro-batches of each
    chunks  in the order in which a micro-batch passes through them
    """
    starts = [sum(rounds[:number]) for number in range(len(rounds))]
    return [
        Instruction(kind, micro_batch, chunk)
        for start, length in zip(starts, rounds)
        for chunk in chunks
        for micro_batch in range(start, start + length)
    ]


def check_schedule_sizes(num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> None:
    """Refuse sizes that are no whole numbers of at least 1.

    num_stages, num_micro_batches, num_chunks  of a schedule

    Raises InputError.
    """
    check_size("num_stages", num_stages)
    check_size("num_micro_batches", num_micro_batches)
    check_size("num_chunks", num_chunks)


def _batches(num_micro_batches: int) -> tuple[list[Instruction], list[Instruction]]:
    numbers = range(num_micro_batches)
    return [Instruction(FORWARD, n) for n in numbers], [Instruction(BACKWARD, n) for n in numbers]
