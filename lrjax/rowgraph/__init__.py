"""Functions as row graphs: which values carry rows, and the stages and segments that make them."""
