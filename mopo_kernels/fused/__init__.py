"""The fused path: custom ops, the schedule of chunks, and one pass over a head."""
