"""Scores that need no training gradients: of labels, words, representations, the last layer.

All are (n_test, n_train) float32, positive for proponents.
"""
