"""From the files of a benchmark to batches: index, media, preprocessing, prompts, order. Never imports `model`."""
