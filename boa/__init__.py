"""The quantizer: objectives, statistics, error-compensated rounding, one block at a time."""
