"""Gradients of single examples, in memory.

A batch goes in, one loss for each example comes out, and a backward pass gives the gradient of each at every site.
Here live the shapes of gradients (words, factors, matrices), the hooks that capture them, and what has to be known of
layers, losses and batches for that. This folder knows torch alone: of the project it imports ``parallel``.
"""
