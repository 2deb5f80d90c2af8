"""Distances between a policy and its reference: exact, estimated, placed, and with their errors."""
