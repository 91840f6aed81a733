"""What docs/recipes.md and examples/ tell, run."""
