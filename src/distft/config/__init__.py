"""Recipes: their schema, files, overrides and validation. Imports neither torch nor TRL."""
