import dataclasses

import torch

from slimlab.model.build import build_model


def to_half(model):
    E = model.config.d_head
    order = [*range(0, E, 2), *range(1, E, 2)]
    if model.config.rotary_layout == "interleaved":
        with torch.no_grad():
            for block in model.blocks:
                for linear in (block.attention.q_proj, block.attention.k_proj):
                    for parameter in linear.parameters():
                        heads = parameter.unflatten(0, (-1, E))
                        parameter.copy_(heads[:, order].flatten(0, 1).clone())
    new = build_model(dataclasses.replace(model.config, rotary_layout="half"))
    new.to(model.lm_head.weight.dtype)
    new.load_state_dict(model.state_dict())
    return new
