"""From a recipe to a finished run: calibration text, stages, run folder, command line."""
