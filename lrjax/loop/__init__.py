"""One row loop: what every step reads and makes, and the arrays that last from step to step."""
