"""Published codes, each run from its own checkout in a process of its own.

These modules need Python and NumPy alone, so that they run in another interpreter.
"""
