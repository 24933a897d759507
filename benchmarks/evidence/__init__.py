"""The study: are the scores true? Measured by training again, on several tasks, beside baselines and other libraries.

``tasks.py`` lists what is fitted, ``texts.py`` and ``networks.py`` what that is made of, ``fitting.py`` the one fit
whose trace is asked. ``python -m benchmarks.evidence`` runs and goes on where it was broken off.
"""
