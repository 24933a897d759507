"""The trace on disk, and how it is written and read.

A trace is a folder of JSON and safetensors files: checkpoints, and for each of them the training examples' gradients in
shards. This folder has the checkpoints, the shards, the lock on a trace, the runs in which training's own gradients are
sorted, and the verification of all files. It does without Lightning, methods and scores; it imports ``gradients`` and
``parallel``.
"""
