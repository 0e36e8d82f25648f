"""Losses of preference-tuning methods, one value per example."""
