"""How often certificates are wrong where every win rate is known."""
