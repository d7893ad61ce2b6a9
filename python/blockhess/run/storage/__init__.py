"""Long jobs that cannot be lost: state on disk, locks, configuration."""
