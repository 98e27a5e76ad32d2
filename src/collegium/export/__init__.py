"""Exports of a student to other tools, verified by reloading them there, and their speed."""
