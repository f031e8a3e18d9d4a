"""MOPO against its rivals on a small language model: warmth maximised, brevity and plain wording held."""
