"""The joint model: VideoLLaMA2 reasons about a clip, and the hidden state at [SEG] prompts SAM for its frames."""
