"""Ways to run a segment, and to differentiate it."""
