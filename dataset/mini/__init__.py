"""The mini world: synthetic clips, sounds, sentences and masks that run the whole pipeline on a CPU."""
