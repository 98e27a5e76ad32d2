"""Studies: one recipe under several settings and seeds, summarized in tables and a page."""
