"""Images and text from files of the user, as batches for the paper's networks."""
