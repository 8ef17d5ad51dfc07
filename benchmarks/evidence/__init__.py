"""What the memories learn: rows and experiments, the training of both, and the page docs/results.md with their
results."""
