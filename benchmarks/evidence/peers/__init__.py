"""Other libraries, and other papers' recipes, on the same network, checkpoints and texts.

Each has a file of its own, since each wants the model in another form (``network.py`` says which). All scores are
(n_test, n_train) float32, positive for proponents.
"""
