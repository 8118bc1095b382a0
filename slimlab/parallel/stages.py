"""Stages: a decoder cut between its layers, each rank with one chunk of them, or several.

Chapter 10 cuts with it. A stage is a module whose parameters have the names that they have in the
whole model, so that gradients, checkpoints and optimizers of all stages fit together. The first
virtual stage has the embedding, the last one the norm behind the blocks and lm_head. Where tables
are tied, the first and the last stage both have the table, under one name, and their gradients are
added up (slimlab.parallel.pipeline), so that equal updates keep the copies equal.

A model that tensor_parallel has cut can be staged; so cut layers first, then stages. Every rank
begins with the whole model, and the rest is freed: it has to fit once.

Production: Megatron-LM builds each stage by itself; torch.distributed.pipelining takes any module
as a stage, or traces a model and cuts it at marks.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from torch import Tensor, nn

from slimlab.config import check_number, check_size, require
from slimlab.model.block import check_ids, check_positions
from slimlab.model.transformer import Decoder, run_blocks
from slimlab.plan.pipeline_schedule import Schedule


class NumberedBlocks(nn.ModuleList):
    """Some blocks of a model, under the numbers that they have in it; iterate over them.

    blocks  number -> block, in the order of the model
    """

    def __init__(self, blocks: dict[int, nn.Module]):
        super().__init__()
        for number, block in blocks.items():
            self.add_module(str(number), block)

    def __getitem__(self, number: int) -> nn.Module:
        """Return the block of a number, counted in the whole model."""
        return self._modules[str(number)]


class Stage(nn.Module):
    """What one rank of a pipeline has of a decoder.

    model           whole; its modules are taken, not copied
    layers          how many blocks each virtual stage has, in the order of the model
    virtual_stages  which of them are here, in the order of the chunks

    layers, virtual_stages  as given
    config, recompute       those of the model
    tied                    the table of the tokens is here as that of lm_head too, or would be in
                            one process: its gradient comes from the first and the last stage
    tensor_parallel         as in the model, if tensor_parallel has cut it
    """

    def __init__(self, model: Decoder, layers: Sequence[int], virtual_stages: Sequence[int]):
        super().__init__()
        self.config, self.recompute = model.config, model.recompute
        self.layers, self.virtual_stages = tuple(layers), tuple(virtual_stages)
        first, last = 0 in self.virtual_stages, len(self.layers) - 1 in self.virtual_stages
        self.tied = (first or last) and model.lm_head.weight is model.embedding.tokens.weight
        if first:
            self.embedding, self.dropout = model.embedding, model.dropout
        elif self.tied:  # the table alone, so that its name is that of the whole model
            self.embedding = nn.Module()
            self.embedding.tokens = model.embedding.tokens
        numbers = [
            one for chunk in range(len(self.virtual_stages)) for one in self.blocks_of(chunk)
        ]
        self.blocks = NumberedBlocks({number: model.blocks[number] for number in sorted(numbers)})
        if last:
            self.final_norm, self.lm_head = model.final_norm, model.lm_head
        self.train(model.training)
        if hasattr(model, "tensor_parallel"):
            self.tensor_parallel = self._own(model.tensor_parallel)

    def blocks_of(self, chunk: int) -> range:
        """Return the numbers of a chunk's blocks in the whole model.

        chunk  from 0
        """
        place = self.virtual_stages[chunk]
        start = sum(self.layers[:place])
        return range(start, start + self.layers[place])

    def is_first(self, chunk: int) -> bool:
        """Tell whether a chunk begins with the embedding.

        chunk  from 0
        """
        return self.virtual_stages[chunk] == 0

    def is_last(self, chunk: int) -> bool:
        """Tell whether a chunk ends with the logits.

        chunk  from 0
        """
        return self.virtual_stages[chunk] == len(self.layers) - 1

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Compute what the first block is given; on the first stage only.

        ids        (B, T) token ids
        positions  (T,) or (B, T); None: from 0
        returns    (B, T, D)

        Raises InputError for ids outside the vocabulary and too long a text.
        """
        check_ids("ids", ids, self.config.vocab_size)
        return self.dropout(self.embedding(ids, check_positions(positions, 0, ids, self.config)))

    def forward(
        self,
        ids: Tensor,
        hidden: Tensor | None = None,
        *,
        chunk: int = 0,
        mask: Tensor | None = None,
        causal: bool = True,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Send a micro-batch through one chunk.

        ids        (B, T) token ids, also where the embedding is elsewhere: they say what positions
                   there are
        hidden     (B, T, D) from the virtual stage before; None: the embedding's, on the first
        chunk      which one
        mask, causal, positions  as in Decoder.forward
        returns    (B, T, D) for the virtual stage behind, or logits (B, T, V)

        Raises InputError for too long a text, and as attention does.
        """
        if hidden is None:
            hidden = self.embed(ids, positions)
        positions = check_positions(positions, 0, ids, self.config)
        blocks = [self.blocks[number] for number in self.blocks_of(chunk)]
        hidden = run_blocks(self, blocks, hidden, positions, mask=mask, causal=causal)
        return self.lm_head(self.final_norm(hidden)) if self.is_last(chunk) else hidden

    def _own(self, done: object) -> object:
        names = {name for name, _ in self.named_parameters()}
        cut_dims = {name: dim for name, dim in done.cut_dims.items() if name in names}
        return replace(done, cut_dims=cut_dims, copied=done.copied & names)


def stage_of(
    model: Decoder, schedule: Schedule, stage: int, layers: Sequence[int] | None = None
) -> Stage:
    """Cut a decoder, and return what one stage has of it.

    model     whole in its layers; tensor_parallel may have cut them
    schedule  says how many stages there are, of how many chunks, and which virtual stage is where
    stage     which, from 0
    layers    how many blocks each virtual stage has; None: as even as can be (even_layers)
    returns   the stage; it shares its modules with the model, of which nothing else is needed

    Raises InputError if layers do not fit the model and the schedule, or one would be empty.
    """
    check_number("stage", stage, int, 0, schedule.num_stages - 1)
    require(
        isinstance(model, Decoder),
        "a whole Decoder",
        f"a {type(model).__name__}",
        'make one with build_model(ModelConfig(..., kind="decoder"))',
    )
    count = schedule.num_virtual_stages
    if layers is None:
        layers = even_layers(len(model.blocks), count)
    check_layers(layers, len(model.blocks), count)
    chunks = range(schedule.num_chunks)
    return Stage(model, layers, [schedule.virtual_stage(stage, chunk) for chunk in chunks])


def even_layers(num_layers: int, num_virtual_stages: int) -> list[int]:
    """Divide layers as evenly as whole layers allow.

    num_layers          of the model
    num_virtual_stages  p v
    returns             how many layers each has; they differ by one at most, and where they do
                        those in the middle have more, since the ends have embedding and logits

    Raises InputError if there are fewer layers than virtual stages.
    """
    return balanced_layers([1.0] * num_layers, num_virtual_stages, first=1e-6, last=1e-6)


def balanced_layers(
    costs: Sequence[float], num_virtual_stages: int, *, first: float = 0.0, last: float = 0.0
) -> list[int]:
    """Divide layers so that the virtual stage with the largest cost has the least.

    costs               of each layer, in any unit: seconds that were measured, FLOP, bytes
    num_virtual_stages  p v
    first               what the first one has besides: the embedding
    last                what the last one has besides: final norm, logits and loss
    returns             how many layers each has. Of all divisions with the least maximum the one
                        with the least sum of squares

    Raises InputError for costs that are negative or not finite, and if there are fewer layers than
    virtual stages.
    """
    check_size("num_virtual_stages", num_virtual_stages)
    for name, value in [*((f"costs[{i}]", c) for i, c in enumerate(costs)), ("first", first)]:
        check_number(name, value, float, 0, float("inf"))
    check_number("last", last, float, 0, float("inf"))
    _check_enough(len(costs), num_virtual_stages)
    sums = [0.0, *accumulate(costs)]
    # best[end]: (maximum, sum of squares, starts) of the parts so far, over the layers before end.
    best = {0: (0.0, 0.0, ())}
    for part in range(num_virtual_stages):
        extra = (first if part == 0 else 0) + (last if part == num_virtual_stages - 1 else 0)
        found = {}
        for end in range(part + 1, len(costs) - (num_virtual_stages - 1 - part) + 1):
            found[end] = min(
                (max(most, cost), squares + cost**2, (*starts, start))
                for start, (most, squares, starts) in best.items()
                if start < end
                for cost in [sums[end] - sums[start] + extra]
            )
        best = found
    starts = [*best[len(costs)][2], len(costs)]
    return [end - start for start, end in zip(starts, starts[1:])]


def check_layers(layers: Sequence[int], num_layers: int, num_virtual_stages: int) -> None:
    """Refuse a division of layers that does not fit.

    layers              how many blocks each virtual stage has
    num_layers          of the model
    num_virtual_stages  p v

    Raises InputError that names the nearest that does.
    """
    _check_enough(num_layers, num_virtual_stages)
    near = f"give {even_layers(num_layers, num_virtual_stages)}, or leave layers out"
    empty = [place for place, number in enumerate(layers) if number < 1]
    given = f"layers = {list(layers)}"
    asked = "at least one layer in every virtual stage"
    require(not empty, asked, f"{given}: none in {', '.join(map(str, empty))}", near)
    asked = f"one number for each of {num_virtual_stages} virtual stages, {num_layers} in all"
    fits = len(layers) == num_virtual_stages and sum(layers) == num_layers
    require(fits, asked, f"{given}, {sum(layers)} in all", near)


def _check_enough(num_layers: int, num_virtual_stages: int) -> None:
    require(
        num_layers >= num_virtual_stages,
        "at least one layer in every chunk of every stage",
        f"{num_layers} layers for {num_virtual_stages} chunks in all",
        f"cut into at most {num_layers}: fewer stages, or fewer chunks on each",
    )
