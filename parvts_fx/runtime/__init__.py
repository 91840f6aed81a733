"""What happens at a call: whether the rewritten graph may run, and what the graphs of one call tell each other."""
