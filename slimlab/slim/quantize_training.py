"""Training that knows it will be rounded: layers that pretend in the forward pass.

Weights stay float32 and learn as ever, but are multiplied as their integers would be; the gradient
passes straight through the rounding. Chapter 14 compares it with rounding after training.

Production begins from a trained model, freezes the ranges after some steps, and folds norms first.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import require
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_layers import ROWS
from slimlab.slim.quantize_maps import fake_quantize


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that multiplies with its rounded weight.

    linear           the layer whose parameters it takes over; they stay the same objects
    scheme           of the weight
    quantize_inputs  round x too, in 8 bits with a range per row, as Int8Linear does
    """

    def __init__(self, linear: nn.Linear, scheme: QuantScheme, quantize_inputs: bool = False):
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias=bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scheme, self.quantize_inputs = scheme, quantize_inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        if self.quantize_inputs:
            x = fake_quantize(x, ROWS)
        return F.linear(x, fake_quantize(self.weight, self.scheme), self.bias)


class FakeQuantizedEmbedding(nn.Embedding):
    """An embedding that looks up rows of its rounded table.

    embedding  the layer whose table it takes over; it stays the same object
    scheme     of the table
    """

    def __init__(self, embedding: nn.Embedding, scheme: QuantScheme):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight, self.scheme = embedding.weight, scheme

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids, int64 of any shape."""
        return F.embedding(ids, fake_quantize(self.weight, self.scheme))


def train_quantized(
    model: nn.Module,
    scheme: QuantScheme,
    *,
    quantize_inputs: bool = False,
    fit_groups: bool = False,
) -> nn.Module:
    """Make every linear layer and embedding of a model pretend to be quantized.

    model            changed in place; its parameters, their names and an optimizer over them stay
    scheme           of all weights
    quantize_inputs  round the inputs of linear layers too, see FakeQuantizedLinear
    fit_groups       as in quantize_model, to which the same is to be given
    returns          the model, for training; quantize_model(model, scheme) then makes the integers

    Raises InputError for a group size that does not divide, and for a model without such layers;
    the model is then as it was.
    """
    found = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear | nn.Embedding)
    }
    given, change = type(model).__name__, "give a model that has some inside it"
    require(found and "" not in found, "linear layers or embeddings in a model", given, change)
    schemes = {}
    for name, one in found.items():
        schemes[name] = scheme.fitted(one.weight.shape[1]) if fit_groups else scheme
        schemes[name].scale_shape(tuple(one.weight.shape))
    for name, one in found.items():
        if isinstance(one, nn.Linear):
            layer = FakeQuantizedLinear(one, schemes[name], quantize_inputs)
        else:
            layer = FakeQuantizedEmbedding(one, schemes[name])
        model.set_submodule(name, layer.train(one.training))
    return model
