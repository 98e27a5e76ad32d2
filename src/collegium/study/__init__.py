"""Questions over many runs: the same recipe under several settings and seeds, in one table and one page."""
