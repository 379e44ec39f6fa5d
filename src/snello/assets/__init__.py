"""What ships inside the package: the micro ViT with its weights, and 2 500 pictures of Fashion-MNIST."""
