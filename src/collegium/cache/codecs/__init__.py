"""Codecs: the columns of distributions and of hidden states."""
