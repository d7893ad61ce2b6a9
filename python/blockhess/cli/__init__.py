"""The `blockhess` command: its commands, options, demo, self-tests and job files."""
