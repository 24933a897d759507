"""How results are drawn: on a terminal, as charts, and as an HTML page.

What is drawn is plain data: explanations in words (explanation), words over a whole test set (word_table), numbers and
labels. This folder knows nothing of traces, checkpoints, methods or results; of the project it imports nothing but
``storage.files``, for files that appear whole or not at all, and ``gradients.printable``, for texts that do no harm.
"""
