"""Models made smaller: distilled, quantized, pruned."""
