"""In-place arithmetic over the vocabulary, row by row: one set of operations, several backends."""
