"""What a trainer is asked after a fit.

``influence`` and ``label_review`` answer; ``asked`` finds the module, trace and loaders that a question leaves open,
``asked_examples`` and ``raw_examples`` make loaders of what else stands for test examples, ``filling`` computes
training gradients that are not stored yet, ``passes`` runs a loader through the public ``Trainer.predict``, and
``steps`` says what is done with each batch. This folder imports ``bridge`` and what is below; it knows of a fit only
what that left behind.
"""
