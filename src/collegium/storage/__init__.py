"""Files on disk, local or behind a URL."""
