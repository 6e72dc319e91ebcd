"""Adapters in the place of weights, for the time of a call."""
