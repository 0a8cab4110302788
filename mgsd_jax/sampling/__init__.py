"""Answers of a model: the jitted sampler, and an endpoint that answers over HTTP."""
