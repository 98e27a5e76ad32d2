"""The offline example: real text from packages, specialist teachers, one recipe."""
