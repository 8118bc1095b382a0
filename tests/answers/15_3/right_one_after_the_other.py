import torch


def smaller_layer(up, up_bias, down, down_bias, inputs, num_kept):
    hidden = torch.relu(inputs @ up.T + up_bias)
    said = hidden @ down.T
    said, centre = said - said.mean(0), said.mean(0)
    columns = hidden - hidden.mean(0)
    kept = []
    while len(kept) < num_kept:  # add the neuron that helps most, one at a time
        rest = [k for k in range(len(up)) if k not in kept]
        if kept:
            basis, values, _ = torch.linalg.svd(columns[:, kept], full_matrices=False)
            basis = basis[:, values > 1e-9 * values[0]]
            left = said - basis @ (basis.T @ said)
            free = columns - basis @ (basis.T @ columns)
        else:
            left, free = said, columns
        length = free.norm(dim=0)
        gain = (free.T @ left).norm(dim=1) / length.clamp(min=1e-9)
        gain[length < 1e-6] = -1.0
        kept.append(max(rest, key=lambda k: gain[k].item()))
    new_down = torch.linalg.lstsq(columns[:, kept], said, driver="gelsd", rcond=1e-9).solution.T
    bias = down_bias + centre - new_down @ hidden[:, kept].mean(0)
    return up[kept], up_bias[kept], new_down, bias
