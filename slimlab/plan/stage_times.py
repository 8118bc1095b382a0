"""How long the parts of a pipeline take: forward, both gradients, messages, stage by stage.

Chapter 10 simulates with them. Real times vary from micro-batch to micro-batch, and messages share
links; here a stage takes as long for each micro-batch, and messages pass one another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from slimlab.config import check_choice, check_divides, check_number, check_size, require
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Instruction,
    Product,
)

MESSAGES = ("overlap", "block", "rendezvous")


@dataclass(frozen=True)
class StageTimes:
    """Seconds of each virtual stage for one micro-batch: a number for all, or one for each.

    forward_s          of the forward pass, above 0
    input_gradient_s   of the gradient with respect to what came in
    weight_gradient_s  of the gradient with respect to the weights; a backward takes both, and with
                       recomputation input_gradient_s contains another forward_s
    message_s          of a message to a neighbour, activations and gradients alike; as a list one
                       for each pair of neighbours in the order of the model
    messages           "overlap": a message is on its way while both stages compute, any number at a
                       time; "block": the sender computes nothing until it has arrived;
                       "rendezvous": the sender also waits until the receiver is at the instruction
                       that needs the message, and then neither computes until it has arrived

    Raises InputError for numbers that are no times. A stage without layers takes no time, so 0 for
    forward_s is refused.
    """

    forward_s: float | Sequence[float]
    input_gradient_s: float | Sequence[float]
    weight_gradient_s: float | Sequence[float]
    message_s: float | Sequence[float] = 0.0
    messages: str = "overlap"

    def __post_init__(self):
        check_choice("messages", self.messages, MESSAGES)
        for name in TIMES:
            given = getattr(self, name)
            several = isinstance(given, list | tuple)
            if several:
                object.__setattr__(self, name, tuple(given))
            for place, number in enumerate(given if several else [given]):
                said = f"{name}[{place}]" if several else name
                if name == "forward_s" and number == 0:
                    where = f"virtual stage {place}" if several else "every stage"
                    asked = "layers on every stage: each forward_s above 0"
                    require(False, asked, f"{said} = 0", f"give {where} a layer, or cut fewer")
                check_number(said, number, float, 0, inf)

    @classmethod
    def of_layers(
        cls, layers: Sequence[int], layer: "StageTimes", *, last_stage: "StageTimes | None" = None
    ) -> "StageTimes":
        """Make the times of virtual stages of several layers each.

        layers      how many layers each virtual stage holds, at least one
        layer       the times of one layer, as plain numbers; its messages are taken over
        last_stage  what the last one does besides: the logits and the loss

        Raises InputError for times that are lists, and for a virtual stage without layers, with the
        nearest number that works.
        """
        check_size("the number of virtual stages", len(layers))
        for place, number in enumerate(layers):
            check_number(f"layers[{place}]", number, int, 0, inf)
        empty, total = [place for place, number in enumerate(layers) if number == 0], sum(layers)
        given = f"{len(layers)} virtual stages with {list(layers)} layers: none in {empty}"
        enough = f"cut {total} layers into at most {total} virtual stages"
        change = enough if total else "give the model layers"
        require(not empty, "at least one layer in every virtual stage", given, change)
        for one in (layer, last_stage or layer):
            one._check_plain()
        columns = {}
        for name in COMPUTING:
            each = [number * getattr(layer, name) for number in layers]
            each[-1] += getattr(last_stage, name) if last_stage else 0
            columns[name] = tuple(each)
        return replace(layer, **columns)

    def in_chunks(self, num_chunks: int) -> "StageTimes":
        """Return the times of stages that are cut into chunks of equal cost.

        num_chunks  v, of each stage; computing is divided by it, messages are as long as before

        Raises InputError for times that differ between stages: cut these yourself.
        """
        check_size("num_chunks", num_chunks)
        self._check_plain()
        return replace(self, **{name: getattr(self, name) / num_chunks for name in COMPUTING})

    def _check_plain(self) -> None:
        listed = [name for name in COMPUTING if isinstance(getattr(self, name), tuple)]
        asked, change = "one number for all stages", "give the times of all virtual stages"
        require(not listed, asked, f"lists for {', '.join(listed)}", change)

    def seconds_of(self, instruction: Instruction, virtual_stage: int) -> float:
        """Return how long an instruction takes.

        instruction    what is computed
        virtual_stage  where
        """
        if instruction.kind == BACKWARD:
            names = ("input_gradient_s", "weight_gradient_s")
        else:
            names = (f"{instruction.kind}_s",)
        return sum(_at(getattr(self, name), virtual_stage) for name in names)

    def message_of(self, product: Product) -> float:
        """Return how long the message of a product takes.

        product  activations go to the next virtual stage, input gradients to the one before
        """
        kind, place, _ = product
        return _at(self.message_s, place if kind == FORWARD else place - 1)

    def check_for(self, num_virtual_stages: int) -> None:
        """Refuse lists that do not fit a schedule.

        num_virtual_stages  of the schedule; there is one pair of neighbours less

        Raises InputError.
        """
        for name in TIMES:
            given = getattr(self, name)
            length = num_virtual_stages - (name == "message_s")
            fits = not isinstance(given, tuple) or len(given) == length
            asked = f"{name}: a number, or {length} for {num_virtual_stages} virtual stages"
            require(fits, asked, f"{given!r}", "give one for each, in the order of the model")


COMPUTING = (f"{FORWARD}_s", f"{INPUT_GRADIENT}_s", f"{WEIGHT_GRADIENT}_s")
TIMES = (*COMPUTING, "message_s")


def _at(given: float | tuple[float, ...], place: int) -> float:
    return given[place] if isinstance(given, tuple) else given


def layers_of_virtual_stages(num_layers: int, num_stages: int, num_chunks: int = 1) -> list[int]:
    """Divide layers evenly among virtual stages.

    num_layers  of the model
    num_stages  p
    num_chunks  v, chunks of each stage
    returns     layers of each of the p v virtual stages

    Raises InputError if there are fewer layers than virtual stages, or they do not divide.
    """
    for name, value in {"num_layers": num_layers, "num_stages": num_stages}.items():
        check_size(name, value)
    check_size("num_chunks", num_chunks)
    cuts, fit = num_stages * num_chunks, num_layers // num_stages
    require(
        num_layers >= cuts,
        "at least one layer in every chunk of every stage",
        f"{num_layers} layers for {num_stages} stages of {num_chunks} chunks, {cuts} in all",
        f"at most num_chunks = {fit}" if fit else f"at most num_stages = {num_layers}",
    )
    check_divides("num_stages times num_chunks", cuts, "num_layers", num_layers)
    return [num_layers // cuts] * cuts
