"""β, the tightness of the leash: how it moves, and how to choose it."""
