"""Choice of a fusion before training: measurements of the teachers, a search, and its verdict."""
