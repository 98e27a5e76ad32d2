"""Targets of frozen teachers on disk: written once, read by any number of students and epochs."""
