"""Measurements: what the losses do in training and what they cost. Not part of the package."""
