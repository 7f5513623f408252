"""Three lm-eval tasks for the embedded model, made from the held-out modules of the running Python by `items`."""
