"""How checkpoints hold weights that are packed."""
