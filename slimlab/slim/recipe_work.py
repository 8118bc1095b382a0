"""What the steps of slim_checkpoint share: the original, the text, and how a smaller model learns.

Chapter 15 puts the steps together. Production trains a small model as long as a large one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from slimlab.config import TrainingConfig
from slimlab.model.transformer import Decoder
from slimlab.slim.distill import DistillationObjective
from slimlab.slim.recipe_config import SlimConfig
from slimlab.text.batches import token_windows
from slimlab.train.loop import train

SAMPLE_BATCHES, SAMPLE_WINDOWS = 8, 8


@dataclass(frozen=True)
class Work:
    """What every step needs.

    teacher  the original
    ids      (N,) of the text to learn from
    held_out_ids  (M,) of the text to measure by
    measure  model -> bits per byte of the held-out text
    config   a SlimConfig
    show     draw bars
    say      told what is being done
    """

    teacher: Decoder = field(repr=False)
    ids: Tensor = field(repr=False)
    held_out_ids: Tensor = field(repr=False)
    measure: Callable[[nn.Module], float]
    config: SlimConfig
    show: bool
    say: Callable[[str], None]


def learn(
    model: Decoder,
    work: Work,
    num_steps: int,
    watch: Callable[[dict], None] | None = None,
    lr_part: float = 1.0,
) -> Decoder:
    """Train a model by the text and the original together.

    model      changed in place
    work       text, original, settings
    num_steps  updates; 0: none
    watch      as in slimlab.train.loop.train
    lr_part    part of the config's peak_lr
    returns    the model, in evaluation mode

    Raises InputError as train does.
    """
    config = work.config
    if not num_steps:
        return model
    settings = TrainingConfig(
        num_steps=num_steps,
        batch_size=config.batch_size,
        seq_len=model.config.seq_len,
        peak_lr=lr_part * config.peak_lr,
        seed=config.seed,
        device="cpu",
    )
    objective = DistillationObjective(
        work.teacher,
        distill_temperature=config.distill_temperature,
        soft_weight=config.soft_weight,
        divergence=config.divergence,
    )
    model.requires_grad_(True)
    train(model, work.ids, settings, objective=objective, show=work.show, say=work.say, watch=watch)
    return model.eval()


def sample_windows(work: Work) -> list[Tensor]:
    """Draw some windows of the text to learn from, on which to look at a model from inside.

    work     text, length of windows and seed
    returns  8 batches of token ids, (8, T) each, always the same ones
    """
    seq_len = work.teacher.config.seq_len
    drawn = token_windows(work.ids, seq_len, SAMPLE_WINDOWS, SAMPLE_BATCHES, work.config.seed)
    return [inputs for inputs, _ in drawn]
