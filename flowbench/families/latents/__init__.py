"""Where a flow lives: data space, or the latent space of an autoencoder, and how that is trained."""
