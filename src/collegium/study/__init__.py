"""Questions asked over many runs."""
