"""Studies: what the method does, on finite problems and real models, and what the trainer does with other models."""
