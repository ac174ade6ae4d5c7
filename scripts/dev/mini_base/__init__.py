"""Pretraining of the mini base: the steps behind `scripts/dev/pretrain_mini_base.py`."""
