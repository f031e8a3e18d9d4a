"""The method's claims on finite problems: canonical preference structures, learning them from pairs, baselines."""
