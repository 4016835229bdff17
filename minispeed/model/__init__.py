"""The model on one device: attention, the GPT, its initial weights, generation."""
