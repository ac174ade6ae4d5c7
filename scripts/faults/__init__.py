"""The fault matrix (`scripts/fault_matrix.py`): processes that are killed, and what must come of it."""
