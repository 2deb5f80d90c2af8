"""Readings of a finished or running run, from its directory alone."""
