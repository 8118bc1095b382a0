"""Text: corpus, tokenizer, near-duplicates, batches."""
