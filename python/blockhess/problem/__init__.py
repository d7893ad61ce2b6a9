"""The loss as a function of the parameters: data, criterion, blocks, model state, and processes that share it."""
