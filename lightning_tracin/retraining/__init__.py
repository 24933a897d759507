"""What would have happened without some of the training examples: the same fit again, on a part of them.

``Retrainings`` runs the fits that are asked for, once each, and keeps what they say of the test examples in a folder
(``folder``); ``subsets`` makes halves, and training sets without some examples; ``fits`` runs one of them,
``distinct_fits`` compares it with the others, and ``observed`` reads what its module says of the test examples
(``held_out``); ``checks`` tells before that what does not belong together. On that stand ``does_it_matter``
(``removing``, ``removals``, ``removal_effect``) and ``recommend`` (``recommending``, ``candidates``,
``recommendation``). ``tail_patch`` needs no retraining. This folder imports ``querying`` and what is below, and
``metrics``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_tracin.retraining.folder import stored_outcomes
    from lightning_tracin.retraining.outcomes import Outcomes
    from lightning_tracin.retraining.recommendation import Recommendation
    from lightning_tracin.retraining.recommending import recommend
    from lightning_tracin.retraining.removal_effect import RemovalEffect
    from lightning_tracin.retraining.removing import does_it_matter
    from lightning_tracin.retraining.retrainings import Retrainings
    from lightning_tracin.retraining.subsets import random_halves, without
    from lightning_tracin.retraining.tail_patch import tail_patch_gains

__all__ = [
    "Outcomes",
    "Recommendation",
    "RemovalEffect",
    "Retrainings",
    "does_it_matter",
    "random_halves",
    "recommend",
    "stored_outcomes",
    "tail_patch_gains",
    "without",
]

_MODULES = {
    "Outcomes": "outcomes",
    "Recommendation": "recommendation",
    "RemovalEffect": "removal_effect",
    "Retrainings": "retrainings",
    "does_it_matter": "removing",
    "random_halves": "subsets",
    "recommend": "recommending",
    "stored_outcomes": "folder",
    "tail_patch_gains": "tail_patch",
    "without": "subsets",
}

if not TYPE_CHECKING:  # as in the package itself: a name's module is imported when the name is asked for

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            globals()[name] = getattr(import_module(f"lightning_tracin.retraining.{_MODULES[name]}"), name)
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
