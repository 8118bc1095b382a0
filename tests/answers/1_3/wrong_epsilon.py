def attend_or_abstain(scores):
    m = scores.amax(-1, keepdim=True).clamp(min=0)
    p = (scores - m).exp()
    return p / ((-m).exp() + p.sum(-1, keepdim=True) + 1e-08)
