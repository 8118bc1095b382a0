"""The recipe of the model of the book, in numbers: what `slimlab train` does unless told otherwise.

slimlab.train.reference trains it and says why; chapter 05 shows the evidence for each choice.
Production recipes are found by trials at several small sizes and carried over to a large one.
"""

VOCAB_SIZE = 1024
MODEL = {"seq_len": 256, "d_model": 192, "num_layers": 4, "num_heads": 6, "dropout": 0.0}
# How initialise() draws the matrices that write into the stream.
RESIDUAL = "zero"
TRAINING = {
    "num_steps": 600,
    "batch_size": 8,
    "peak_lr": 3e-3,
    "weight_decay": 0.1,
    "seed": 0,
}
HELD_OUT_FRACTION = 0.1
