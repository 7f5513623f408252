"""Models that see: a decoder of text inside, beside a tower that reads images."""
