"""One self-contained page, and its JSON twin, from a run directory."""
