"""Frozen models that score rows."""
