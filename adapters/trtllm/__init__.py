"""TensorRT-LLM: planned."""
