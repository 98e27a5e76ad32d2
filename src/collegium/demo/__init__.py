"""Demo with real text from Python packages, specialist teachers and one recipe."""
