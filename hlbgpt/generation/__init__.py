"""Sampling, the streaming detokenizer, and trained networks loaded from files."""
