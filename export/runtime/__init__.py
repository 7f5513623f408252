"""What runs a finished model: packed layers, packed cache, memory, adapters."""
