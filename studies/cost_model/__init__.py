"""What a step costs on machines that are not at hand, and what of that was measured here."""
