"""The command line, the trainer, its data and its reports."""
