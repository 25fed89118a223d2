"""Names of the scopes that row loops give to their operations in compiled programs."""

LINE_BUFFERS = "line_buffers"  # operations that keep rows between steps
