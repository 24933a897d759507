"""What a fit and a query share of Lightning.

Here a LightningModule says what it is (the mixin), its batches are turned into gradients, data sets become numbered
examples, test examples are collected into results, and progress is shown. What is private in Lightning, or differs
between its two packages, stands in ``compat`` alone. Everything below this folder does without Lightning; of the
project it imports ``results``, ``scoring``, ``storage``, ``gradients`` and ``parallel``.
"""
