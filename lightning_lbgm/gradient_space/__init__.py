"""The space that gradients span: Gram matrices and principal directions."""
