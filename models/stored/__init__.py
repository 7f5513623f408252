"""How checkpoints hold a config, and weights that are packed."""
