"""All legal layouts of a model on a number of GPUs, and why the others are not legal.

slimlab.plan.planner sorts them by time. Chapter 11 counts them.

Narayanan et al. 2021 (arXiv:2104.04473), section 3: the axes, their product, and what must divide.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import isqrt

from slimlab.config import InputError, ModelConfig, check_size
from slimlab.plan.hardware import Cluster
from slimlab.plan.layout_memory import rank_bytes
from slimlab.plan.parallel_config import (
    RECOMPUTE,
    ParallelConfig,
    check_parallel,
    legal_chunks,
    num_micro_batches,
)
from slimlab.plan.software import Software

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# A tensor group on more hosts than this is never near the best.
TENSOR_HOSTS = 2


@dataclass(frozen=True)
class Choices:
    """What a search may choose from; a tuple of one value pins it.

    tensor, pipeline, data   sizes of the axes; None: all that divide
    micro_batch_size         sequences that pass through the stages together
    num_chunks               pieces of the model per stage; None: all that divide
    recompute                words of ParallelConfig
    sequence_parallel        False, True or both; it needs tensor > 1
    zero_stage               0 to 3
    """

    tensor: tuple[int, ...] | None = None
    pipeline: tuple[int, ...] | None = None
    data: tuple[int, ...] | None = None
    micro_batch_size: tuple[int, ...] | None = None
    num_chunks: tuple[int, ...] | None = None
    recompute: tuple[str, ...] = RECOMPUTE
    sequence_parallel: tuple[bool, ...] = (False, True)
    zero_stage: tuple[int, ...] = (0, 1, 3)


@dataclass
class Refused:
    """Layouts that one reason holds back.

    reason   in a few words
    example  the sizes of one of them
    change   what would let that one pass
    count    how many; a size that can be in no layout counts once
    """

    reason: str
    example: str
    change: str = ""
    count: int = 0


@dataclass
class Search:
    """All layouts that the choices allow; it remembers why it drops others.

    config, cluster, num_gpus, batch_size, software  as in plan_layouts of slimlab.plan.planner
    choices      what it may choose from
    refused      reason -> layouts that it holds back
    num_layouts  legal ones that were made
    """

    config: ModelConfig
    cluster: Cluster
    num_gpus: int
    batch_size: int
    software: Software
    choices: Choices
    refused: dict[str, Refused] = field(default_factory=dict)
    num_layouts: int = 0

    def refuse(self, reason: str, example: str, change: str = "") -> None:
        """Count a layout, or a size, that is dropped.

        reason, example, change  as in Refused
        """
        self.refused.setdefault(reason, Refused(reason, example, change)).count += 1

    def candidates(self) -> Iterator[tuple[ParallelConfig, dict[str, float]]]:
        """Make the legal layouts, and the bytes of a rank of their fullest stages."""
        for tensor, pipeline, data in self._meshes():
            for micro_batch_size in self._micro_batch_sizes(data):
                at_once = ParallelConfig(data, pipeline, tensor, micro_batch_size)
                for num_chunks in self._chunks(at_once):
                    sizes = (data, pipeline, tensor, micro_batch_size, num_chunks, "1f1b")
                    yield from self._variants(sizes)

    def _meshes(self) -> Iterator[tuple[int, int, int]]:
        most = TENSOR_HOSTS * self.cluster.gpus_per_host
        for size in self.choices.data or ():
            check_size("data", size)
        for tensor in self._sizes("tensor", self.num_gpus):
            if tensor > most and self.choices.tensor is None:
                reason = f"tensor groups on more than {TENSOR_HOSTS} hosts"
                self.refuse(reason, f"tensor {tensor}")
                continue
            one = ParallelConfig(tensor=tensor)
            if not self._legal("heads or d_ff that do not divide", one, 1):
                continue
            for pipeline in self._sizes("pipeline", self.num_gpus // tensor):
                data = self.num_gpus // (tensor * pipeline)
                if self.choices.data is not None and data not in self.choices.data:
                    wanted = ", ".join(map(str, self.choices.data))
                    example = f"tensor {tensor}, pipeline {pipeline}, data {wanted}"
                    change = f"data={data} for {self.num_gpus} GPUs"
                    self.refuse("axes that do not multiply to the GPUs", example, change)
                    continue
                one = ParallelConfig(pipeline=pipeline, tensor=tensor)
                if self._legal("layers that do not divide", one, 1):
                    yield tensor, pipeline, data

    def _sizes(self, name: str, whole: int) -> list[int]:
        """Sizes of an axis: what the choices pin, or all that divide the GPUs that are left."""
        pinned, divisors = getattr(self.choices, name), divisors_of(whole)
        if pinned is None:
            return divisors
        for size in pinned:
            check_size(name, size)
            if size not in divisors:
                near = sorted(sorted(divisors, key=lambda one: abs(one - size))[:3])
                listed = ", ".join(map(str, near))
                example = f"{name} = {size}, {whole} GPUs to divide"
                self.refuse("an axis that does not divide the GPUs", example, f"{name} {listed}")
        return [size for size in pinned if size in divisors]

    def _legal(self, reason: str, parallel: ParallelConfig, batch_size: int) -> bool:
        try:
            check_parallel(self.config, parallel, batch_size)
        except InputError as error:
            self.refuse(reason, error.given, error.change)
            return False
        return True

    def _micro_batch_sizes(self, data: int) -> Iterator[int]:
        for size in self.choices.micro_batch_size or MICRO_BATCH_SIZES:
            try:
                num_micro_batches(ParallelConfig(data, micro_batch_size=size), self.batch_size)
            except InputError as error:
                self.refuse("a batch that does not divide", error.given, error.change)
            else:
                yield size

    def _chunks(self, parallel: ParallelConfig) -> Iterator[int]:
        legal = legal_chunks(self.config.num_layers, parallel.pipeline)
        pinned = self.choices.num_chunks
        count = num_micro_batches(parallel, self.batch_size)
        for chunks in legal if pinned is None else [one for one in pinned if one in legal]:
            if chunks > 1 and count % parallel.pipeline:
                reason = "chunks, but micro-batches in no multiple of the stages"
                example = f"{count} micro-batches, {parallel.pipeline} stages"
                self.refuse(reason, example, "num_chunks=1")
                continue
            yield chunks
        for chunks in pinned or ():
            if chunks not in legal:
                example = f"{chunks} chunks, {parallel.pipeline} stages"
                change = f"num_chunks from {', '.join(map(str, legal))}"
                self.refuse("chunks that layers do not divide into", example, change)

    def _variants(self, sizes: tuple) -> Iterator[tuple[ParallelConfig, dict[str, float]]]:
        data, _, tensor = sizes[:3]
        ways = [one for one in self.choices.recompute if self._differs(one)]
        shares = self.choices.sequence_parallel if tensor > 1 else (False,)
        zeros = self.choices.zero_stage if data > 1 else (0,)
        for recompute, sequence_parallel, zero_stage in product(ways, shares, zeros):
            parallel = ParallelConfig(*sizes, recompute, sequence_parallel, zero_stage)
            if sequence_parallel and self.config.seq_len % tensor:
                continue
            self.num_layouts += 1
            items = rank_bytes(self.config, parallel, self.batch_size, self.software)
            yield parallel, items

    def _differs(self, recompute: str) -> bool:
        """Fused attention keeps no scores, so that selective recomputation changes nothing."""
        pinned = len(self.choices.recompute) == 1
        return recompute != "selective" or self.software.attention == "explicit" or pinned


def divisors_of(number: int) -> list[int]:
    """List the whole numbers that divide a number, the smallest first.

    number  at least 1
    """
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
