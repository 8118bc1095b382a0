import copy
import dataclasses

import torch

from slimlab.model.build import build_model


def to_half(model):
    E = model.config.d_head
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    order = [*range(0, E, 2), *range(1, E, 2)]
    if model.config.rotary_layout == "interleaved":
        for name, weight in weights.items():
            if ".q_proj." in name or ".k_proj." in name:
                heads = weight.unflatten(0, (-1, E))
                weights[name] = heads[:, order].flatten(0, 1)
    new = build_model(dataclasses.replace(model.config, rotary_layout="interleaved"))
    new.to(model.lm_head.weight.dtype)
    new.load_state_dict(weights)
    return new
