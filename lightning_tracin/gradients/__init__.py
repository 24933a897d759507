"""Gradients of single examples, in memory.

A forward pass gives one loss for each example of a batch, and one backward pass gives the gradient of every example at
every site. This folder has the forms of gradients (words, factors, matrices), the hooks that capture them, and the
analysis of layers, losses and batches that capturing needs. It depends on torch; of the project it imports
``parallel``.
"""
