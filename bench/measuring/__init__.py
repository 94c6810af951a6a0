"""How it is measured: rows in turns, processes, profiles. Read ``measure.py`` first."""
