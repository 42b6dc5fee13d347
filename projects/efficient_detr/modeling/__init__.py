"""The shared detector and the parts that plug into it."""
