"""Between dense and sparse in any nn.Module, and over steps."""
