"""Text: near-duplicates, sources, corpus, byte pairs, tokenizer, batches."""
