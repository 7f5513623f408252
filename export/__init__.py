"""What leaves: packed integers, our format, and the loader that transformers calls."""
