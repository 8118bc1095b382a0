"""A pipeline schedule as data: for each stage, the list of instructions that it works through.

Chapter 10 reads, draws and times schedules; slimlab.parallel.schedules writes them, and nothing
here knows a rank. A stage holds one chunk of the model, or several. Chunks are numbered in the
order of the model as virtual stages, and a placement says which stage holds which of them.

Production: torch.distributed.pipelining has the same letters, and messages as instructions of their
own; Megatron-LM writes each schedule as a program. Here the messages follow from the order.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slimlab.config import InputError, check_choice, check_number, check_size, require

FORWARD, BACKWARD = "forward", "backward"
INPUT_GRADIENT, WEIGHT_GRADIENT = "input_gradient", "weight_gradient"
# Letters as in torch.distributed.pipelining; Qi et al. write B for the input gradient alone.
LETTERS = {"F": FORWARD, "B": BACKWARD, "I": INPUT_GRADIENT, "W": WEIGHT_GRADIENT}
KINDS = {kind: letter for letter, kind in LETTERS.items()}
# loop: chunk 0 of all stages, then chunk 1 of all stages; v: every other chunk runs backward.
PLACEMENTS = ("loop", "v")


@dataclass(frozen=True)
class Instruction:
    """One thing that a stage computes; written F3, or F3.1 for chunk 1.

    kind         "forward" (F), "backward" (B: both gradients), "input_gradient" (I) or
                 "weight_gradient" (W)
    micro_batch  which one, from 0
    chunk        which of the stage's chunks of the model, from 0

    Raises InputError for an unknown kind or a number below 0.
    """

    kind: str
    micro_batch: int
    chunk: int = 0

    def __post_init__(self):
        check_choice("kind", self.kind, tuple(KINDS))
        check_number("micro_batch", self.micro_batch, int, 0, float("inf"))
        check_number("chunk", self.chunk, int, 0, float("inf"))

    def __str__(self):
        chunk = f".{self.chunk}" if self.chunk else ""
        return f"{KINDS[self.kind]}{self.micro_batch}{chunk}"


# What an instruction makes or needs: its kind (never "backward"), virtual stage and micro-batch.
Product = tuple[str, int, int]


@dataclass(frozen=True)
class Schedule:
    """What each stage of a pipeline does, in which order; whether that can work is not looked at.

    name               what it is called
    num_micro_batches  m, in one step
    stages             the instructions of each stage, stage 0 holds the first layers
    num_chunks         v, chunks of the model on each stage
    placement          "loop": chunk c of stage s is virtual stage c p + s, of p stages; "v": where
                       c is odd it is c p + p - 1 - s, so that neighbours of both kinds meet

    Raises InputError for sizes that are none, or an instruction of a micro-batch or chunk that
    does not exist. slimlab.parallel.schedule_checks looks at the order.
    """

    name: str
    num_micro_batches: int
    stages: tuple[tuple[Instruction, ...], ...]
    num_chunks: int = 1
    placement: str = "loop"

    def __post_init__(self):
        check_size("num_micro_batches", self.num_micro_batches)
        check_size("num_chunks", self.num_chunks)
        check_choice("placement", self.placement, PLACEMENTS)
        object.__setattr__(self, "stages", tuple(tuple(order) for order in self.stages))
        check_size("the number of stages", len(self.stages))
        for stage, order in enumerate(self.stages):
            for one in order:
                fits = one.micro_batch < self.num_micro_batches and one.chunk < self.num_chunks
                sizes = f"{self.num_micro_batches} micro-batches and {self.num_chunks} chunks"
                given, change = f"stage {stage}: {one}", "count both from 0"
                require(fits, f"instructions for {sizes}", given, change)

    @property
    def num_stages(self) -> int:
        """Number p of stages."""
        return len(self.stages)

    @property
    def num_virtual_stages(self) -> int:
        """Number p v of chunks that the model is cut into."""
        return self.num_stages * self.num_chunks

    def virtual_stage(self, stage: int, chunk: int) -> int:
        """Return the place of a chunk in the order of the model, from 0.

        stage, chunk  where it is held
        """
        back = self.placement == "v" and chunk % 2 == 1
        return chunk * self.num_stages + (self.num_stages - 1 - stage if back else stage)

    def place_of(self, virtual_stage: int) -> tuple[int, int]:
        """Return the stage that holds a virtual stage, and which of its chunks that is.

        virtual_stage  from 0
        """
        chunk, along = divmod(virtual_stage, self.num_stages)
        back = self.placement == "v" and chunk % 2 == 1
        return (self.num_stages - 1 - along if back else along), chunk

    def needs(self, stage: int, instruction: Instruction) -> tuple[Product, ...]:
        """List what must be there before an instruction can start.

        A forward needs the activations of the virtual stage before it; a backward or an input
        gradient its own activations and the gradient of the virtual stage after it; a weight
        gradient its own input gradient.

        stage        whose instruction
        instruction  one of its
        """
        place, batch = self.virtual_stage(stage, instruction.chunk), instruction.micro_batch
        if instruction.kind == FORWARD:
            return ((FORWARD, place - 1, batch),) if place else ()
        if instruction.kind == WEIGHT_GRADIENT:
            return ((INPUT_GRADIENT, place, batch),)
        after = ((INPUT_GRADIENT, place + 1, batch),) if place + 1 < self.num_virtual_stages else ()
        return ((FORWARD, place, batch), *after)

    def makes(self, stage: int, instruction: Instruction) -> tuple[Product, ...]:
        """List what is there when an instruction has ended; a backward makes both gradients.

        stage        whose instruction
        instruction  one of its
        """
        place, batch = self.virtual_stage(stage, instruction.chunk), instruction.micro_batch
        both = (INPUT_GRADIENT, WEIGHT_GRADIENT)
        kinds = both if instruction.kind == BACKWARD else (instruction.kind,)
        return tuple((kind, place, batch) for kind in kinds)

    def receiver_of(self, product: Product) -> int | None:
        """Return the stage that a product is sent to; None if it stays where it was made.

        product  activations go to the next virtual stage, input gradients to the one before
        """
        kind, place, _ = product
        if kind == WEIGHT_GRADIENT:
            return None
        target = place + 1 if kind == FORWARD else place - 1
        if not 0 <= target < self.num_virtual_stages:
            return None
        stage = self.place_of(target)[0]
        return None if stage == self.place_of(place)[0] else stage

    def __str__(self):
        rows = (" ".join(map(str, order)) for order in self.stages)
        return "\n".join(f"stage {stage}: {row}" for stage, row in enumerate(rows))


def read_schedule(
    rows: Sequence[str], *, name: str = "read", num_chunks: int = 1, placement: str = "loop"
) -> Schedule:
    """Make a schedule of text: a row for each stage, such as "F0 F1 B0 B1".

    rows        instructions between spaces: a letter of F, B, I, W, the micro-batch, and for chunks
                above 0 a point and the chunk
    name, num_chunks, placement  as in Schedule
    returns     the schedule; there are as many micro-batches as the largest number says

    Raises InputError for words that are no instructions.
    """
    orders = [[_read_instruction(word) for word in row.split()] for row in rows]
    last = max((one.micro_batch for order in orders for one in order), default=0)
    return Schedule(name, last + 1, tuple(map(tuple, orders)), num_chunks, placement)


def _read_instruction(word: str) -> Instruction:
    found = re.fullmatch(r"([FBIW])(\d+)(?:\.(\d+))?", word)
    asked = "instructions such as F0, B12 or W3.1 (chunk 1)"
    if found is None:
        raise InputError(asked, repr(word), "write a letter of F, B, I, W, then the micro-batch")
    letter, micro_batch, chunk = found.groups()
    return Instruction(LETTERS[letter], int(micro_batch), int(chunk or 0))


def held_activations(order: Sequence[Instruction]) -> Iterator[tuple[Instruction, int]]:
    """Count the activations that a stage holds while it works through its instructions.

    A forward takes hold of one, those of one micro-batch in one chunk. The weight gradient lets go
    of them, or the backward, which computes it too. An input gradient lets go of nothing: the
    inputs of the linear layers are still needed, and what it could free is not counted.

    order    the instructions of one stage
    returns  pairs: an instruction, and how many are held while it runs
    """
    held = 0
    for one in order:
        held += one.kind == FORWARD
        yield one, held
        held -= one.kind in (BACKWARD, WEIGHT_GRADIENT)


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Return how many activations each stage holds when it holds most; the times do not matter.

    schedule  with v chunks per stage, each of which has 1/v of the stage's activations
    returns   for each stage, in units of one micro-batch in one chunk: divide by v for stages
    """
    return tuple(
        max((held for _, held in held_activations(order)), default=0) for order in schedule.stages
    )
