"""Metrics, paired comparison, verdict and plots, computed from prediction files alone."""
