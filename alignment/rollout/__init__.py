"""Answers from prompts: the sampler and the engine that drives a model token by token."""
