"""A run that is over, and was not recorded: its checkpoints made into a trace that a trainer can be asked about.

``checkpoints`` and ``trainer_folder`` read what Lightning, Hugging Face's Trainer or anybody else saved; ``names``
finds the module's names of the weights, ``optimizers`` whose the optimizers' states are, ``rates`` the learning rates
between checkpoints, and ``known`` what is written of each. ``beginning`` puts it together, and ``trace`` has the public
``Trace``. Gradients are left to the first question. This folder imports ``querying``, ``recording`` and what is below.
"""
