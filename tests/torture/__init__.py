"""What tries to break the package: each part takes how often, a seed and a folder, and returns what it counted.

``make torture`` runs all of them for half an hour (``__main__.py``); `make test` has a small setting of each.
"""
