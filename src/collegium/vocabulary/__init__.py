"""Vocabulary compatibility between a teacher and the student, compared as bytes per token id."""
