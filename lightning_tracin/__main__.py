"""``python -m lightning_tracin`` is the command ``lightning-tracin``."""

from __future__ import annotations


def main() -> int:
    """Run the command; Ctrl-C is quiet also while its modules are imported."""
    try:
        from lightning_tracin.cli.command import main as command

        return command()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
