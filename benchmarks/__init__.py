"""Speed and memory, as ratios inside one run. ``make bench`` runs a small setting of each table."""
