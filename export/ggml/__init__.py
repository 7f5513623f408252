"""What the types of llama.cpp hold."""
