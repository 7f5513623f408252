"""Programs that run an export where people serve it, each with the interpreter of its runtime; `ask` starts them."""
