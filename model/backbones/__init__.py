"""Vision, sound and language models that AURORA can ride on, one package or file each."""
