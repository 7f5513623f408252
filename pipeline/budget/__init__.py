"""Bits for each layer out of a budget: what each choice costs, and the cheapest that fits."""
