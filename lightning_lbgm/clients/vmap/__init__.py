"""Vectorised training of several clients by ``torch.func.vmap``, and the checks that it equals training them alone."""
