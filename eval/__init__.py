"""Measurements of a model, in any of its forms."""
