"""Files on disk or behind a URL, and their typed contents."""
