"""Run directories: crash-safe files, locks, signals, checkpoints."""
