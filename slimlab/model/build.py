"""Make the model that a configuration describes. Chapter 03 makes one of each kind."""

from torch import nn

from slimlab.config import ModelConfig
from slimlab.model.encoder import Encoder
from slimlab.model.seq2seq import EncoderDecoder
from slimlab.model.transformer import Decoder

KINDS = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}


def build_model(config: ModelConfig) -> nn.Module:
    """Make a Decoder, an Encoder or an EncoderDecoder, with weights drawn from torch's generator.

    config   its kind decides
    """
    return KINDS[config.kind](config)
