"""What calibration decides of the rotation, and what is outside the blocks."""
