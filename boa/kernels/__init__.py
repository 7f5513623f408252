"""What runs for every weight: dispatch to compiled, Triton or torch."""
