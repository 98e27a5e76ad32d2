"""Distill several frozen language-model teachers into one small student."""
