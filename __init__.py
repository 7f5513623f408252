"""RotoBoA."""
