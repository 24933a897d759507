"""Several processes, and weights that are spread over them.

``processes`` lets the processes of a fit or a query agree, and fail together; ``fsdp`` reads and writes what
FullyShardedDataParallel has spread out. The engine is torch.distributed. This folder imports nothing of the project.
"""
