"""Pretraining of the mini base: the steps behind `scripts/pretrain_mini_base.py`."""
