"""From an objective to integers: scales, rounding, refinement."""
