"""The embedded world: a help desk with a known language, known preferences and a known truth."""
