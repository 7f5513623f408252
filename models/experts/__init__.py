"""Experts of a mixture: their modules, and how files hold them."""
