"""Arithmetic over the vocabulary, row by row and in place: one set of operations, several backends."""
