"""What a fit leaves on disk, and how it is written and read.

A trace is a folder of JSON and safetensors: checkpoints, and for each of them the training examples' gradients in
shards. Here live its parts, the lock on it, the runs that training's own gradients come in, and the check of all files.
This folder knows nothing of Lightning, methods or scores; it imports ``gradients`` and ``parallel``.
"""
