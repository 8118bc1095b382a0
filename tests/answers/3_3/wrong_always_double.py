import copy
import dataclasses

from slimlab.model.build import build_model


def to_half(model):
    E = model.config.d_head
    new = build_model(dataclasses.replace(model.config, rotary_layout="half")).double()
    weights = copy.deepcopy(model.state_dict())
    order = [*range(0, E, 2), *range(1, E, 2)]
    if model.config.rotary_layout == "half":
        order = list(range(E))
    for name, weight in weights.items():
        if ".q_proj." in name or ".k_proj." in name:
            weights[name] = weight.unflatten(0, (-1, E))[:, order].flatten(0, 1)
    new.load_state_dict(weights)
    return new
