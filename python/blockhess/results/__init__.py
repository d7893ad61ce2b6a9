"""Results and their files."""
