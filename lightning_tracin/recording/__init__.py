"""What happens inside a fit.

``callback`` translates Lightning's hooks, ``beginning`` checks what can be checked before the first step, ``recorder``
lives until the last one. Beside them stand the sources of gradients (a pass at each checkpoint, or training's own
backward passes), the logging of validations, and the estimate of space. This folder imports ``bridge`` and what is
below.
"""
