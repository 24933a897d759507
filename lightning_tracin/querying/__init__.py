"""What a trainer is asked after a fit.

``influence`` and ``label_review`` answer; ``asked`` finds the module, trace and loaders that a question leaves open,
``filling`` computes training gradients that are not stored yet, ``passes`` runs a loader through the public
``Trainer.predict``. This folder imports ``bridge`` and what is below; it knows of a fit only what that left behind.
"""
