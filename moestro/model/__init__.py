"""The model: layers, attention, experts, MTP, and its Hugging Face form on disk."""
