import copy
import dataclasses

from slimlab.model.build import build_model


def to_half(model):
    made = copy.deepcopy(model)
    if model.config.rotary_layout == "interleaved":
        for block in made.blocks:
            block.attention.rotary_layout = "half"
            for linear in (block.attention.q_proj, block.attention.k_proj):
                for parameter in linear.parameters():
                    rest = parameter.shape[1:]
                    pairs = parameter.data.view(-1, model.config.d_head // 2, 2, *rest)
                    parameter.data = pairs.transpose(1, 2).reshape(-1, *rest)
        made.config = dataclasses.replace(model.config, rotary_layout="half")
    return made
