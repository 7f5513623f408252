"""The table of architectures: one row a `model_type` of transformers, as data."""
