"""What runs with the model: quantizers of activations and cache, attention, transforms of inputs."""
