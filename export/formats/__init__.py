"""What other runtimes and transformers read: native, compressed-tensors, GPTQ, GGUF."""
