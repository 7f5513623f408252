"""The embedded model: a small trained Llama, its tokenizer and its text."""
