"""Outlier suppression, exact: Hadamard rotations folded into a decoder."""
