"""One decoder block, true-sequential: what is shared, its halves (attention, MLP, experts), its output."""
