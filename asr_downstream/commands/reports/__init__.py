"""One page about runs: verdicts, arms, curves, pictures, cost, provenance; a single HTML file that needs nothing else.

Nothing in a run is executed: JSON, logs and pictures are read as data, and configs as literals.
"""
