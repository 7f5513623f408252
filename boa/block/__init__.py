"""One decoder block, true-sequential: what does not change, the steps (fold, attention, MLP, experts), its output."""
