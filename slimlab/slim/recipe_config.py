"""What a model is to go through to become smaller: the choices of slim_checkpoint, checked.

slimlab.slim.recipe carries them out; chapter 15 and `slimlab slim` fill them in.
Production recipes name a choice for each layer; here one holds for all.
"""

from dataclasses import dataclass, fields

from slimlab.config import check_choice, check_number, check_size, require
from slimlab.slim.distill_losses import DIVERGENCES, check_temperature
from slimlab.slim.quantize_cast import CASTS

FORMATS = ("int8", "int4", "int3", "int2", *CASTS)
PARTS = ("neurons", "heads", "both", "weights", "2:4")
MASKED = ("weights", "2:4")  # zeros in matrices of the old shape
ACTIVATIONS = ("none", "dynamic")
# Choices that say nothing unless something else is asked for, and what that is. Numbers of updates
# are left out: one set of them serves many recipes.
_BELONGS = (
    ("distill", ("student_layers",), "distill=True"),
    ("prune", ("prune_what",), "prune=0.5"),
    ("quantize", ("quant_group_size", "rounding", "aware_steps"), 'quantize="int4"'),
    ("quantize", ("activations",), 'quantize="int8"'),
)
_OF_TRAINING = ("distill_temperature", "soft_weight", "divergence")


@dataclass(frozen=True)
class SlimConfig:
    """What slim_checkpoint is to do; a step that is not asked for is left out.

    distill              a student of fewer layers learns from the original
    student_layers       its layers, spread over those of the original; None: half of them
    distill_steps        updates
    distill_temperature  T of the soft targets, above 0
    soft_weight          of every training here: from 0, the true tokens alone, to 1, the original
                         alone. Chapter 13 measures why 0.9, at a temperature of 1
    divergence           "forward" or "reverse", see slimlab.slim.distill_losses.soft_loss
    prune                the part that goes, above 0 and below 1
    prune_what           "neurons" of the feed-forward layers, "heads", or "both": removed for good;
                         single "weights" of least magnitude, or two of every four, "2:4" (0.5 is
                         the only part then): zeros that the file does not hold, though memory and
                         time stay as they are; not with quantize, which stores zeros like others
    prune_steps          updates of retraining; 0: none
    quantize             "int8", one scale per channel, or "int4", "int3" and "int2", one of 16
                         bits per group of weights; embeddings too. "bfloat16" and "float16" are
                         casts
    quant_group_size     weights that share a scale; None: for each layer the divisor of its width
                         nearest to 32. "int8" has no groups
    rounding             "nearest" or "compensated"; None: compensated below 8 bits, but nearest
                         after aware_steps, since the weights then learned to be rounded so
    activations          "dynamic": int8 layers round their inputs too, and multiply in int8;
                         "none": weights become floats when they are used
    aware_steps          updates of training with rounded weights, before the rounding
    batch_size           sequences of an update
    peak_lr              highest learning rate of every training but that of aware_steps, which
                         polishes and has 0.3 of it
    seed                 of the windows drawn

    Raises InputError if nothing is asked for, a number is out of its range, a choice is unknown,
    choices contradict each other, or one says nothing since what it belongs to is not asked for.
    """

    distill: bool = False
    student_layers: int | None = None
    distill_steps: int = 400
    distill_temperature: float = 1.0
    soft_weight: float = 0.9
    divergence: str = "forward"
    prune: float | None = None
    prune_what: str = "neurons"
    prune_steps: int = 200
    quantize: str | None = None
    quant_group_size: int | None = None
    rounding: str | None = None
    activations: str = "none"
    aware_steps: int = 0
    batch_size: int = 8
    peak_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self):
        given, change = "none of them", 'give quantize="int8", for instance'
        asked = "at least one of distill, prune and quantize"
        require(self.distill or self.prune is not None or self.quantize, asked, given, change)
        if self.student_layers is not None:
            check_size("student_layers", self.student_layers)
        check_temperature(self.distill_temperature)
        check_number("soft_weight", self.soft_weight, float, 0, 1)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_size("distill_steps", self.distill_steps)
        for name in ("prune_steps", "aware_steps"):
            check_number(name, getattr(self, name), int, 0, 10**9)
        check_size("batch_size", self.batch_size)
        check_number("peak_lr", self.peak_lr, float, 0, float("inf"), above=True)
        check_number("seed", self.seed, int, 0, 2**32 - 1)
        self._check_pruning()
        self._check_quantization()
        self._check_belonging()

    def _check_pruning(self) -> None:
        check_choice("prune_what", self.prune_what, PARTS)
        if self.prune is None:
            return
        check_number("prune", self.prune, float, 0, 1, above=True)
        half = self.prune == 0.5 or self.prune_what != "2:4"
        asked, change = "prune = 0.5 with two of every four", "give prune=0.5"
        require(half, asked, f"prune = {self.prune:g}", change)
        given = f"prune_what = {self.prune_what!r} with quantize = {self.quantize!r}"
        change = 'give prune_what="neurons", or leave quantize out'
        asked = "integers without single zeros, which would be stored like any other number"
        require(not (self.quantize and self.prune_what in MASKED), asked, given, change)

    def _check_quantization(self) -> None:
        check_choice("activations", self.activations, ACTIVATIONS)
        if self.rounding is not None:
            check_choice("rounding", self.rounding, ("nearest", "compensated"))
        if self.quant_group_size is not None:
            check_size("quant_group_size", self.quant_group_size)
        if self.quantize is None:
            return
        asked, given = f"quantize: one of {', '.join(FORMATS)}", f"quantize = {self.quantize!r}"
        cast = "; 16 bits is a cast: bfloat16" if "16" in str(self.quantize) else ""
        require(self.quantize in FORMATS, asked, given, f"choose one of these{cast}")
        names = ("quant_group_size",) if self.quantize == "int8" else ()
        if self.quantize in CASTS:  # nothing is rounded to integers
            names = ("quant_group_size", "rounding", "aware_steps")
        wrong = " and ".join(name for name in names if getattr(self, name))
        asked, given = "choices that the format has", f"quantize = {self.quantize!r} with {wrong}"
        require(not wrong, asked, given, f'leave {wrong} out, or give quantize="int4"')
        given = f"quantize = {self.quantize!r}, activations = {self.activations!r}"
        asked, change = "activations in integers with int8 only", 'give quantize="int8"'
        require(self.quantize == "int8" or self.activations == "none", asked, given, change)

    def _check_belonging(self) -> None:
        defaults = {one.name: one.default for one in fields(self)}
        pruned = self.prune is not None and self.prune_steps
        trained = self.distill or pruned or self.aware_steps
        groups = [
            (owner, *rest, getattr(self, owner) != defaults[owner]) for owner, *rest in _BELONGS
        ]
        groups.append(("a training", _OF_TRAINING, "distill=True", bool(trained)))
        for owner, names, example, is_there in groups:
            idle = [name for name in names if getattr(self, name) != defaults[name]]
            given = ", ".join(f"{name} = {getattr(self, name)!r}" for name in idle)
            change = f"give {example}, or leave {' and '.join(idle)} out"
            asked = f"{' and '.join(idle)} with {owner}"
            require(is_there or not idle, asked, f"{given} without it", change)
