"""Speed of single ops and of the Lanczos loop, on CPU and GPU."""
