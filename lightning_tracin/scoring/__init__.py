"""From gradients to scores.

This folder has the methods, the products of gradients that scores are made of, the terms that a method reads from a
trace, and the selection of the strongest examples. It takes and returns tensors, without Lightning and without words
for people. It imports ``storage``, ``gradients`` and ``parallel``.
"""
