"""The model organism: an invented world, its language and tokenizer, and the models trained on it."""
