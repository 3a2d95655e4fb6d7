"""Text to batches: corpus, tokenizer, chat template, shards, packing."""
