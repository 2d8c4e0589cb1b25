"""Patches in, probabilities out: the network on its device, and overlapping patches blended."""
