"""The command line.

``subcommands`` adds ``influence``, ``self_influence`` and ``label_issues`` to LightningCLI; ``command`` is the program
``lightning-tracin``, which looks into traces and results without a model, and estimates what a trace will take. This
folder may import every other.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_tracin.cli.subcommands import InfluenceCLIMixin, TracInCLI

__all__ = ["InfluenceCLIMixin", "TracInCLI"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the program imports this folder too, and must not wait for Lightning
        from lightning_tracin.cli import subcommands

        return getattr(subcommands, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
