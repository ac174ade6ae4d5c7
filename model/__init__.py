"""The networks: VideoLLaMA2 towers and language model, SAM, and the joint AURORA model with its stages."""
