"""Several processes that work together, and weights that FSDP spreads over them.

``processes`` exchanges values between the processes of a fit or a query and makes an error in one of them fail all;
``fsdp`` reads and writes weights that FullyShardedDataParallel has spread. Both use torch.distributed. This folder
imports nothing else of the project.
"""
