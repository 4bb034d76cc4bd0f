"""Fine-tune Qwen2-VL and Qwen3-VL on surgical visual question answering."""

__version__ = "0.1.0"
