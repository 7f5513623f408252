"""What a decoder is, whoever made it: families as data, checkpoints read one block at a time."""
