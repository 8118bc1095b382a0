import torch
from torch import nn
from torch.nn import functional as F


def distil(teacher, inputs, labels):
    """A student of at most 400 numbers that knows what the teacher knows."""
    torch.manual_seed(0)
    asked = torch.randn(1000, 6)  # the teacher knows what nobody has labelled
    soft = teacher(asked).softmax(-1)  # once: half of the budget
    student = nn.Sequential(nn.Linear(6, 26), nn.Tanh(), nn.Linear(26, 8))  # 398 numbers
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
    num_steps = 160
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.004 * (1 - step / num_steps)
        some = torch.randint(len(asked), (64,))
        loss = F.kl_div(student(asked[some]).log_softmax(-1), soft[some], reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student
