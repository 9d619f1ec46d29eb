"""Measurements of Flux. Ratios within one run are what to trust: machines are noisy."""
