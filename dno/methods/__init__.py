"""Methods: each finds the noise, or the weights, that a reward prefers."""
