"""Graders of the exercises of chapter 09, model parallelism.

9.1, what a degree costs; 9.2, a loss that is right, stands in ch09_factor.py, 9.3, a row layer
whose bias is cut too, in ch09_row.py, 9.4, label smoothing over a cut vocabulary, in
ch09_vocabulary.py and 9.5, where to cut a model by layers, in ch09_layers.py. The oracle of 9.1 is
slimlab.plan.tensor_parallel, whose numbers the chapter compares with tensors and ledgers.

Production planners choose the degree by measured seconds too.
"""

from functools import cache
from math import prod

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch09_factor import factor
from slimlab.classroom.checks.ch09_layers import layers
from slimlab.classroom.checks.ch09_row import row
from slimlab.classroom.checks.ch09_vocabulary import vocabulary
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.config import InputError, ModelConfig
from slimlab.plan.tensor_parallel import local_param_shapes, predict_step

__all__ = ["degrees", "factor", "layers", "row", "vocabulary"]

BYTES_PER_PARAM, STREAM_BYTES = 16, 2
KEYS = ("degree", "copies", "stream_sums", "copy_sums", "gigabytes")
# d_model, heads, key heads, d_ff, vocabulary: shared key heads, one for all, as many as heads
SHAPES = (
    (48, 12, 6, 96, 120),
    (48, 12, 4, 96, 120),
    (48, 12, 1, 96, 96),
    (64, 8, 8, 160, 64),
    (60, 6, 2, 180, 126),
    (48, 24, 6, 96, 480),
    (56, 7, 7, 49, 77),
    (80, 10, 5, 100, 50),
    (32, 4, 2, 36, 18),
)

# key heads, heads, features of a head, d_ff, vocabulary
MODELS = (
    (8, 64, 128, 22016, 32000),
    (8, 40, 128, 13824, 32000),
    (4, 48, 64, 9216, 32000),
    (6, 24, 128, 9216, 50304),
    (4, 32, 128, 11008, 50304),
    (2, 12, 128, 8960, 151936),
)


def draw_model(rng) -> dict:
    """Draw a model and a batch for 9.1; rng is a random.Random."""
    num_kv_heads, num_heads, d_head, d_ff, vocab_size = rng.choice(MODELS)
    return {
        "num_layers": rng.choice([24, 32, 36, 40]),
        "d_model": num_heads * d_head,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "d_ff": d_ff,
        "vocab_size": vocab_size,
        "num_tokens": rng.choice([2048, 4096, 8192]),
    }


@cache
def config_of(num_layers: int, shape: tuple) -> ModelConfig:
    """Make the configuration of the exercise's model.

    num_layers  number of blocks
    shape       d_model, num_heads, num_kv_heads, d_ff, vocab_size
    """
    d_model, num_heads, num_kv_heads, d_ff, vocab_size = shape
    return ModelConfig(
        vocab_size, 16, d_model, num_layers, num_heads, num_kv_heads,
        d_ff=d_ff, feed_forward="swiglu",
    )  # fmt: skip


@cache
def held(num_layers: int, shape: tuple, degree: int) -> int:
    """Count the parameters on a rank; num_layers and shape as in config_of.

    degree  number of ranks

    Raises InputError if the degree is not legal.
    """
    shapes = local_param_shapes(config_of(num_layers, shape), degree)
    return sum(prod(one) for one in shapes.values())


@cache
def legal(shape: tuple) -> tuple[int, ...]:
    """List the legal degrees, by asking for one after the other; shape as in config_of."""
    found = []
    config_of(1, shape)  # a shape that is none would seem to have no legal degree
    for degree in range(1, shape[1] + 1):
        try:
            held(1, shape, degree)
        except InputError:
            continue
        found.append(degree)
    return tuple(found)


def shape_text(shape: tuple) -> str:
    """Write the sizes in `shape` with their names."""
    names = ("d_model", "num_heads", "num_kv_heads", "d_ff", "vocab_size")
    return ", ".join(f"{name}={size}" for name, size in zip(names, shape))


degrees = Exercise(
    "9.1",
    "What a degree costs",
    requires=("my_prediction", "legal_degrees", "held_params", "smallest_degree"),
    stars=1,
    instance=draw_model,
    hints=(
        "Three sizes must be divided: heads, d_ff, vocabulary. Of key heads: each rank needs those "
        "of its queries, so either whole heads of its own, or one that others have too.",
        "With 12 heads and 4 key heads on 3 ranks a rank has 4 heads: of how many key heads? And "
        "are these the same for no other rank?",
        "held_params: per block two norms of d_model whole, q and out D x D cut, k and v cut into "
        "as many parts as there are, at most, key heads; three matrices D x d_ff cut.",
        "smallest_degree: more ranks never hold more; try the legal degrees in order.",
        "Sums of the stream: two per block forward, two backward, one at the table, one at the "
        "head. Each is of num_tokens times d_model numbers of 2 bytes.",
    ),
)


@degrees.property("the legal degrees", points=2)
def _(student, numbers):
    function = function_of(student, "legal_degrees")
    for shape in SHAPES:
        saw = function(*shape[1:])
        what = f"legal_degrees({', '.join(map(str, shape[1:]))})"
        expect(isinstance(saw, list | tuple), f"{what}: {form_of(saw)}", "a list", "its last line")
        saw = [whole_number(one, what, "its last line: a list of whole numbers") for one in saw]
        look = "each size in turn, and key heads that are copied, but never cut"
        expect_equal(saw, legal(shape), what, look)


@degrees.property("the parameters on a rank", points=2)
def _(student, numbers):
    function = function_of(student, "held_params")
    for num_layers in (1, 3):
        for shape in SHAPES:
            for degree in legal(shape):
                what = f"held_params, num_layers={num_layers}, {shape_text(shape)}, degree={degree}"
                look = "what is cut, what is whole, and how many key heads a rank has"
                saw = whole_number(function(num_layers, *shape, degree), what, "a whole number")
                expect_equal(saw, held(num_layers, shape, degree), what, look)


@degrees.property("the smallest degree that fits", points=2)
def _(student, numbers):
    function = function_of(student, "smallest_degree")
    for shape in SHAPES:
        needed = [BYTES_PER_PARAM * held(2, shape, degree) for degree in legal(shape)]
        budgets = [n_bytes + more for n_bytes in needed for more in (0, -1)]
        for budget in budgets:
            fit = [one for one, n_bytes in zip(legal(shape), needed) if n_bytes <= budget]
            what = f"smallest_degree, num_layers=2, {shape_text(shape)}, device_bytes={budget}"
            look = "legal degrees alone, in order; what fits exactly fits; 0 if none does"
            saw = whole_number(function(2, *shape, budget), what, "a whole number")
            expect_equal(saw, fit[0] if fit else 0, what, look)


@degrees.property("your prediction by hand was right", points=2)
def _(student, numbers):
    names = ("d_model", "num_heads", "num_kv_heads", "d_ff", "vocab_size")
    shape = tuple(numbers[name] for name in names)
    degree = legal(shape)[-1]
    step = predict_step(
        config_of(numbers["num_layers"], shape), 1, numbers["num_tokens"], degree, STREAM_BYTES
    )
    sums = [n_bytes for name, n_bytes in step.forward + step.backward if name == "all_reduce"]
    wanted = {
        "degree": degree,
        "copies": max(1, degree // numbers["num_kv_heads"]),
        "stream_sums": len(sums),
        "copy_sums": len(step.gradients),
        "gigabytes": sum(sums) / 1e9,
    }
    looks = {
        "degree": "every size: which of them stops you first?",
        "copies": "ranks and key heads: how many ranks share one?",
        "stream_sums": "blocks, there and back, and the two ends of the model",
        "copy_sums": "what copies of a weight must do with their gradients, in every block",
        "gigabytes": "numbers in the stream, 2 bytes each; 1e9 bytes are one gigabyte",
    }
    saw = function_of(student, "my_prediction")()
    form = f"a dictionary with the keys {', '.join(KEYS)}"
    fits = isinstance(saw, dict) and set(KEYS) <= set(saw)
    expect(fits, f"my_prediction(): {form_of(saw)}", form, "its last line")
    for key in KEYS:
        what = f"my_prediction()[{key!r}]"
        if key == "gigabytes":
            by_hand = {"rtol": 0.005, "reason": "you may round"}
            expect_close(saw[key], wanted[key], what, looks[key], **by_hand)
        else:
            expect_equal(saw[key], wanted[key], what, looks[key])
