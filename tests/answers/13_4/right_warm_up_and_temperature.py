import torch
from torch import nn
from torch.nn import functional as F


def distil(teacher, inputs, labels):
    generator = torch.Generator().manual_seed(5)
    more = torch.randn(1100, 6, generator=generator)
    every = torch.cat((inputs, more))
    target = teacher(every)
    target = (target / 2).log_softmax(-1)
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(6, 26), nn.GELU(), nn.Linear(26, 8))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.08, total_steps=160)
    for _ in range(160):
        some = torch.randperm(len(every), generator=generator)[:80]
        log_q = (student(every[some]) / 2).log_softmax(-1)
        loss = 4 * F.kl_div(log_q, target[some], reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student
