"""Self-contained HTML report of a run, rendered from the files in its folder."""
