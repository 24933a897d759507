"""``python -m lightning_tracin`` is the command ``lightning-tracin``."""

from lightning_tracin.cli.command import main

raise SystemExit(main())
