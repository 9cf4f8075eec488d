"""The algorithms: one file a method, from top to bottom."""
