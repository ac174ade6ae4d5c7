"""VideoLLaMA2.1-7B-AV at any size: vision tower, connector, audio tower, language model, splice and weights."""
