"""Scores of weights and what is kept by them: what the finders share."""
