"""``python -m lightning_tracin`` is the command ``lightning-tracin``."""

from lightning_tracin.commands import main

raise SystemExit(main())
