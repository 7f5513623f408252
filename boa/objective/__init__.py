"""The quadratic that a layer is rounded by, and the statistics of calibration that it is made from."""
