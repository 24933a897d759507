"""From scores to what people read.

Here lives InfluenceResult, in layers that each add a subject: what is kept in a file (stored_result), what the scores
say by themselves (ranked_result), what they mean in words (explained_result), what a file takes along of that
(portable_result), and how it is shown (result). These read the evidence that a trace has, or the excerpt of it that a
file has, and join tokens into words. Labels are reviewed (label_table) and corrected (corrections). This folder hands
plain data to ``report``, which draws it; it imports ``report``, ``scoring``, ``storage`` and ``gradients``, and nothing
of Lightning.
"""
