"""Text from a model: the cache, sampling, generation, conversation."""
