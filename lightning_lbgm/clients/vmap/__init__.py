"""Vectorised training of several clients at once by ``torch.func.vmap``, and the proof that it comes to the same."""
