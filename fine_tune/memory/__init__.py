"""How much memory a training step takes, from shapes alone, and the most that fits."""
