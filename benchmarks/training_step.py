"""A training step of our decoder beside the LLaMA of `transformers`, same shape, same weights.

    python -m benchmarks.training_step --shape middle --rounds 21 --threads 1

A step is: logits, mean cross-entropy, gradients, one update by PyTorch's fused AdamW, gradients
set to zero. Ours takes the loss by causal_objective, as slimlab's training does, theirs by
PyTorch's cross_entropy on their logits. Both get the same batches and begin with the same weights;
that both compute the same loss is checked first, after several updates too. `transformers` runs
with attention "sdpa", without a cache, in the same dtype; neither is compiled.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import CLOCKS, Laps, compare, environment, parser, refuse_without, report
from slimlab.config import ModelConfig, require
from slimlab.model.transformer import Decoder
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import make_optimizer

OURS, THEIRS = "slimlab", "transformers"
LLAMA = {"feed_forward": "swiglu", "norm": "rms", "positions": "rotary"}
SHAPES = {
    "tiny": {"d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "small": {"d_model": 128, "num_layers": 4, "num_heads": 4},
    "middle": {"d_model": 256, "num_layers": 6, "num_heads": 8, "num_kv_heads": 4},
}
LR = 1e-3
# Losses of two models that add in another order part by rounding: 1e-6 in float32 after a few
# steps, a thousand times as much in bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def config_of(shape: str, seq_len: int, vocab_size: int) -> ModelConfig:
    """Return a LLaMA's configuration of one of SHAPES.

    shape       a key of SHAPES
    seq_len     T
    vocab_size  V
    """
    return ModelConfig(vocab_size, seq_len, **SHAPES[shape], **LLAMA)


def their_model(ours: Decoder) -> nn.Module:
    """Make the LlamaForCausalLM of `transformers` with the shape and the weights of `ours`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.d_head,
            max_position_embeddings=config.seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rotary_base,
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=config.bias,
            mlp_bias=config.bias,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    named = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(named, strict=True)
    return theirs


def their_name(name: str) -> str:
    """Return what `transformers` calls the parameter that we call `name`."""
    for our_part, their_part in (
        ("embedding.tokens.", "model.embed_tokens."),
        ("blocks.", "model.layers."),
        ("final_norm.", "model.norm."),
        ("attention_norm.", "input_layernorm."),
        ("feed_forward_norm.", "post_attention_layernorm."),
        ("attention.out_proj.", "self_attn.o_proj."),
        ("attention.", "self_attn."),
        ("feed_forward.", "mlp."),
    ):
        name = name.replace(our_part, their_part)
    return name


class Step:
    """A model, its optimizer and the batches that it is trained on, in a circle.

    loss_of  inputs (B, T), targets (B, T) -> the mean loss
    model    whose parameters are updated
    batches  (inputs, targets) pairs of (B, T) ids
    clock    a key of CLOCKS
    """

    def __init__(
        self,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        model: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor]],
        clock: str = "wall",
    ):
        self.loss_of, self.batches, self.clock, self.number = loss_of, batches, clock, 0
        self.optimizer = make_optimizer("adamw", model.train(), lr=LR)

    def run(self) -> Laps:
        """Do one step; return the seconds of its three parts."""
        inputs, targets = self.batches[self.number % len(self.batches)]
        self.number += 1
        times = [self._now(inputs.device)]
        loss = self.loss_of(inputs, targets)
        times.append(self._now(inputs.device))
        loss.backward()
        times.append(self._now(inputs.device))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(self._now(inputs.device))
        self.loss = loss.detach()
        parts = ("forward", "backward", "update")
        return {part: end - start for part, start, end in zip(parts, times, times[1:])}

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return CLOCKS[self.clock]()


def make_steps(
    config: ModelConfig, batch_size: int, device: str, dtype: torch.dtype, clock: str = "wall"
) -> dict[str, Step]:
    """Make both rivals with equal weights and batches, and check that they compute the same.

    config      shape of both
    batch_size  B
    device      where both run
    dtype       of weights and gradients
    clock       a key of CLOCKS
    """
    torch.manual_seed(0)
    ours = Decoder(config)
    theirs = their_model(ours).to(device, dtype)
    ours = ours.to(device, dtype)
    shape = (4, batch_size, config.seq_len + 1)
    ids = torch.randint(config.vocab_size, shape).to(device)
    batches = [(some[:, :-1].contiguous(), some[:, 1:].contiguous()) for some in ids]

    def our_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        loss_sum, num_tokens = causal_objective(ours, (inputs, targets))
        return loss_sum / num_tokens

    def their_loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = theirs(input_ids=inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    steps = {
        OURS: Step(our_loss, ours, batches, clock),
        THEIRS: Step(their_loss, theirs, batches, clock),
    }
    for _ in range(len(batches)):
        losses = []
        for step in steps.values():
            step.run()
            losses.append(step.loss)
        require(
            bool((losses[0] - losses[1]).abs() < TOLERANCE[dtype] * losses[1]),
            "two models that compute the same loss",
            f"losses {losses[0]:.6f} and {losses[1]:.6f}",
            "compare their logits layer by layer before any time is compared",
        )
    return steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command line `arguments`."""
    options = parser(__doc__.splitlines()[0], rounds=21)
    options.add_argument("--shape", choices=SHAPES, default="middle", help="default middle")
    options.add_argument("--batch-size", type=int, default=8, help="B (default 8)")
    options.add_argument("--seq-len", type=int, default=128, help="T (default 128)")
    options.add_argument("--vocab-size", type=int, default=1025, help="V (default 1025)")
    options.add_argument("--device", default="cpu", help="cpu (default), cuda or mps")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = options.parse_args(arguments)
    refuse_without("transformers")
    import transformers

    where = environment(given)
    torch.set_num_threads(given.threads)
    config = config_of(given.shape, given.seq_len, given.vocab_size)
    dtype = getattr(torch, given.dtype)
    steps = make_steps(config, given.batch_size, given.device, dtype, given.clock)
    rivals = {name: (lambda step=step: step.run) for name, step in steps.items()}
    comparisons = compare("step", rivals, given.rounds, warm_up=2, clock=given.clock)
    settings = {
        "shape": given.shape,
        **{name: getattr(config, name) for name in ("d_model", "d_ff", "num_layers")},
        **{name: getattr(config, name) for name in ("num_heads", "num_kv_heads", "vocab_size")},
        "batch_size": given.batch_size,
        "seq_len": given.seq_len,
        "dtype": given.dtype,
        "device": given.device,
        "transformers": transformers.__version__,
    }
    report("training_step", settings, where, comparisons, given.json)


if __name__ == "__main__":
    main()
