"""Many processes: launch, collectives, watch."""
