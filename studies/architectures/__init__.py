"""What MOPOTrainer does with every causal architecture of transformers."""
