"""Studies: what the library does on real models, as commands that anyone can run again."""
