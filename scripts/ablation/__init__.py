"""What scripts/ablate.py is made of: the graph of runs, their cost, and the tables."""
