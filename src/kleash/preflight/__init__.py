"""Before a run: small independent checks over the very objects that training will use."""
