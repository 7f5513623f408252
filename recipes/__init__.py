"""Recipes by name: YAML files, read as package data."""
