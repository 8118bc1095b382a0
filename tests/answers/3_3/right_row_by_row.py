import copy
import dataclasses

import torch

from slimlab.model.build import build_model


def to_half(model):
    config = dataclasses.replace(model.config, rotary_layout="half")
    new = build_model(config).to(next(model.parameters()).dtype)
    new.load_state_dict(copy.deepcopy(model.state_dict()))
    if model.config.rotary_layout == "half":
        return new
    E = config.d_head
    with torch.no_grad():
        for old_block, block in zip(model.blocks, new.blocks):
            for name in ("q_proj", "k_proj"):
                old, linear = getattr(old_block.attention, name), getattr(block.attention, name)
                for row in range(old.out_features):
                    head, feature = divmod(row, E)
                    pair, second = divmod(feature, 2)
                    place = head * E + pair + second * (E // 2)
                    linear.weight[place] = old.weight[row]
                    if old.bias is not None:
                        linear.bias[place] = old.bias[row]
    return new
