"""What the memories learn: rows and experiments, their training, and the page docs/results.md made of their results."""
