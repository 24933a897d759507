"""How good scores are: metrics of data attribution, as torchmetrics has them.

Each metric exists twice: a class with a state, which is updated by batches and gathered over processes, and a function
in ``functional``. They know tensors and torchmetrics, and nothing of the rest of this package. Scores are (n_test,
n_train), positive for proponents.
"""
