"""From gradients to scores.

Here live the methods, the products that they are made of, what they read of a trace (terms), and the choice of the
strongest. Tensors in, tensors out: this folder knows nothing of Lightning or of what people read. It imports
``storage``, ``gradients`` and ``parallel``.
"""
