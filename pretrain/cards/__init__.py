"""The parts of a model card: what is known of a model and its run, and how each section says it.

What lives here: facts read from artifacts, sections over them, metadata, the picture of the curves. What must not:
numbers that no artifact holds. Whatever is missing is left out or said to be unknown.
"""
