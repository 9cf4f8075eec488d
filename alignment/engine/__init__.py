"""Passes over micro batches, gradients, the optimizer and its schedule: where the layouts end."""
