"""Decoders without a row of their own: where they keep their parts is found by running them."""
