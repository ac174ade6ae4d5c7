"""The data engine: who writes reasoning, what a reply must hold, and how replies reach the disk."""
