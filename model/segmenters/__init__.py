"""Mask models that a [SEG] feature can prompt, one file each."""
