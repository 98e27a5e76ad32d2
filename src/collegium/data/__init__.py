"""Data pipeline: files and hub datasets in, token windows with their targets out."""
